"""Stochastic depth (Huang 2016, 1603.09382): rows of the batch skip what a layer adds, the later the layer
the more often.

    torchrun train.py config/babylm.py config/stochastic_depth.py

Attention and MLP are skipped apart from each other, with a chance that rises linearly to 0.2 in the last
layer; what is kept counts for more, so that its mean stays. Rows, not steps: the program is the same every
time, so nothing is saved, and the gain must come from regularisation. Expected: as dropout, for text that is
read many times. A first look stands in the README.
"""
layer_drop = 0.2
