"""Which shape should be trained: legal shapes under a budget, their cost, the candidates, and the choice among them."""
