"""What a model is trained to predict: an objective per kind of content.

An objective chooses the rows of a micro-batch that concern it, builds the module that turns their
content into the first rows of the stream, and the module that turns the last rows into losses.
"""
