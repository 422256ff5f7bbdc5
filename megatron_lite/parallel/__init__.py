"""Where a tensor is sharded: the mesh of ranks, collectives with gradients, parallel layers, loss and pipeline."""
