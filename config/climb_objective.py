"""CLIMB's objective curriculum (Diehl Martinez 2023, 2311.08886): word classes first, words later.

    torchrun train.py config/babylm.py config/climb_objective.py

A second head guesses the class of the next token's word. Guessing it is half of the loss at first and fades
to nothing over the first quarter of the run. The classes are induced from the training text (`prepare_data.py
--classes`), as BabyLM's rules ask: no tagger. CLIMB found gains on some tasks and none overall; what it does
here stands in the README.
"""
prepare = '--classes 29'
class_loss = 0.5
class_until = 0.25
