"""Syntactic smoothing (Diehl Martinez 2024, 2410.11462): rare words learn from frequent ones of their kind.

    torchrun train.py config/babylm.py config/syntactic_smoothing.py
    torchrun train.py config/babylm.py config/syntactic_smoothing.py --smoothing_by=uniform     its control

Half of every target is at first shared out among the tokens whose words are of like classes, by the cosine of
their class counts over a temperature; that share falls to nothing as the run ends, because smoothed targets
cost bits per byte. The paper found less frequency bias (`sample.py --eval`) and much of it from uniform
smoothing too: always run the control. Classes are induced from the training text, no tagger. Never a matrix
of V x V: a table of one row a token, 32 wide. Expected: a little more loss; what happened stands in the
README.
"""
prepare = '--classes 29'
smoothing = 0.5
smoothing_temperature = 0.025
