"""When a convolution and a fully connected layer are the same."""
