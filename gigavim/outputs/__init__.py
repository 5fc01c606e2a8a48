"""Results on disk: the label store, and the writers that pull from it window by window."""
