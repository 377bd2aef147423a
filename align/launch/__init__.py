"""Starting several processes on this machine, and what each of them does."""
