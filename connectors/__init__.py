"""WHERE IT TOUCHES THE WORLD: the near edge (services) and the far edge (workers). Imports schemas only."""
