"""How much does each layer, head, neuron and channel matter? Forward passes only, but for two baselines."""
