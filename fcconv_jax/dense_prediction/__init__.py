"""Dense prediction: a function of one crop, run over whole images."""
