"""Training of the models that gigavim ships: data, augmentation, losses, the loop."""
