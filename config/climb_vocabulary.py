"""CLIMB's vocabulary curriculum (Diehl Martinez 2023, 2311.08886): the frequent words first.

    torchrun train.py config/babylm.py config/climb_vocabulary.py

A tenth of the ids, the most frequent, is known at first, all of them from 7/8 of the run on. A rarer one
stands as the tokenizer's unknown id in the input and is left out of the loss: taught as a target, that id
would be what the model learns to say. CLIMB found no consistent gain; what it does here stands in the README.
"""
vocabulary_floor = 0.1
