"""Our schemas and those of a registry: published by a person, compared by workers at their start.

A registry that is away stops nobody: what is on the wire is named by `ids.json`. One that has other schemas than ours does.
"""

import logging
from typing import Any

from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.registry import Registry
from tollway.schemas.registry import COMPATIBILITY, committed, faults, newer
from tollway.streams.settings import Settings

log = logging.getLogger(__name__)

PUBLISH = "publish ours with `tollway schema publish`, or correct TOLLWAY_SCHEMA_REGISTRY_URL"


def registry_of(settings: Settings) -> Registry:
    """The registry of the settings. Raises Refused where they name none."""
    if not settings.schema_registry_url:
        raise Refused(
            "TOLLWAY_SCHEMA_REGISTRY_URL is not set: give the registry's address, such as http://127.0.0.1:8081"
        )
    return Registry(
        settings.schema_registry_url,
        settings.schema_registry_user,
        settings.schema_registry_password.get_secret_value(),
        ca_file=settings.schema_registry_ca_file,
    )


async def publish(settings: Settings) -> list[dict[str, Any]]:
    """Give the registry what it lacks, oldest first, under the rule that ours keep; a row a version: `added` or not."""
    rows = []
    async with registry_of(settings) as registry:
        for subject in dict.fromkeys(each.subject for each in committed()):
            if await registry.rule(subject) != COMPATIBILITY:
                await registry.set_rule(subject, COMPATIBILITY)
        for each in committed():
            there = {each.subject: await registry.schemas(each.subject)}
            added = bool(faults([each], there))
            if added:
                await registry.publish(each.subject, each.text)
            rows.append({"subject": each.subject, "version": each.version, "added": added})
    return rows


async def registry_report(settings: Settings) -> dict[str, list[str]]:
    """`faults`: what of ours is not there as it is here, or not protected; `newer`: subjects that have more than we know."""
    ours = committed()
    async with registry_of(settings) as registry:
        subjects = list(dict.fromkeys(each.subject for each in ours))
        registered = {subject: await registry.schemas(subject) for subject in subjects}
        rules = {subject: await registry.rule(subject) for subject in subjects if registered[subject]}
    loose = [
        f"{subject} takes versions that are compatible {rule or 'as the registry pleases'}, must be {COMPATIBILITY}"
        for subject, rule in rules.items()
        if rule != COMPATIBILITY
    ]
    return {"faults": faults(ours, registered) + loose, "newer": newer(ours, registered)}


async def refuse_other_schemas(settings: Settings) -> None:
    """At a worker's start, where a registry is set. Raises Refused where it lacks a version of ours or has it otherwise."""
    if not settings.schema_registry_url:
        return
    try:
        report = await registry_report(settings)
    except Unavailable as error:
        log.warning("%s: schemas are not compared", error)
        return
    if report["faults"]:
        raise Refused(f"the registry has other schemas than this worker: {'; '.join(report['faults'])}: {PUBLISH}")
    for subject in report["newer"]:
        log.warning("%s has a version that this worker does not know: deploy workers before emitters", subject)
