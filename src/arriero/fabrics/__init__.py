"""How is a machine reached?  One way a module, all behind the interface in `base`."""
