"""How much does a student differ from its teacher? Pure functions of logits and states."""
