"""From a model and some data to activation statistics: feeds in, sums out.

feeds makes valid inputs, generate lets the model write its own text, prose has text for those that cannot, data
chooses between what the user gave and that, channels traces where channels go, segments runs the graph part by part.
"""
