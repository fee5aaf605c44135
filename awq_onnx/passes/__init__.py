"""Graph in, graph out. First plan (sites, absorb), then edit (fold, rewrite), then check.

Planning returns frozen values and changes nothing. No pass knows a model family or runs a session; arithmetic on
weights is limited to what a fold needs.
"""
