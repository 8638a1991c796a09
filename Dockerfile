# Workers and the `tollway` command: the wheel with its ingest extra (the pipeline is in it) and nothing else, as an unprivileged user.
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE requirements-dev.lock ./
COPY src src
COPY schemas schemas
COPY connectors connectors
COPY streams streams
# The environment has no pip of its own: what is installed is what the lock pins, and stays so.
RUN python -m venv --without-pip /opt/tollway \
    && pip wheel --no-cache-dir --no-deps --wheel-dir /dist . \
    && pip --python /opt/tollway/bin/python install --no-cache-dir --constraint requirements-dev.lock "$(echo /dist/*.whl)[ingest]"

FROM python:3.11-slim
RUN groupadd --gid 10001 tollway \
    && useradd --uid 10001 --gid tollway --no-create-home --home-dir /var/lib/tollway --shell /usr/sbin/nologin tollway \
    && install --directory --owner tollway --group tollway --mode 0700 /var/lib/tollway
COPY --from=build /opt/tollway /opt/tollway
ENV PATH=/opt/tollway/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TOLLWAY_DATA=/var/lib/tollway
# The only folder that is written to: with a volume or tmpfs there, the root file system may be read-only.
WORKDIR /var/lib/tollway
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["tollway"]
CMD ["worker", "--group", "all"]
