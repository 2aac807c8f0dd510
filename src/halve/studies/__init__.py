"""Studies: one table or figure of the papers each, in small, with seeds repeated and a verdict on every claim.

catalog/NAME.yaml   what is compared and what the paper says of it (declare reads it)
base.yaml           what all studies share
arms                an arm and a seed made into a recipe
engine              every arm and seed run, figures collected
statistics          means, paired differences, verdicts
page                results as a table and a plot
"""
