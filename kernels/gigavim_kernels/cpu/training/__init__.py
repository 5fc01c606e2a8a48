"""The scan and the convolution with gradients, for training on a CPU with tied decay rates."""
