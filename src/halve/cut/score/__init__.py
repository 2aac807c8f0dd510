"""How important is each layer, head, neuron and channel? Forward passes are enough, except for two baselines."""
