"""Archives: many slides through one recipe, on one machine or many, resumable at any moment."""
