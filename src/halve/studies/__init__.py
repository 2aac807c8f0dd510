"""Studies: each reproduces one table or figure of the papers on a small scale, with several seeds and verdicts.

catalog/NAME.yaml   what is compared and what the paper claims about it (read by declare)
base.yaml           what all studies share
arms                from an arm and a seed to a recipe
engine              runs every arm and seed, and collects the results
statistics          means, paired differences, verdicts
page                the results as a table and a plot
"""
