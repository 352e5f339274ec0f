"""CLIMB's data curriculum (Diehl Martinez 2023, 2311.08886): easy text first, all of it towards the end.

    torchrun train.py config/babylm.py config/climb_data.py

Documents are ranked by their surprisal under bigrams of the training text; a tenth of the text is admitted at
first, all of it from 7/8 of the run on. Any measure that `prepare_data.py --scores` makes can take its place
(--curriculum=source_rank is CLIMB's spoken to written), and --pacing=log admits four fifths of the text
within the first eighth of the rise. CLIMB found no consistent gain over its own baseline; what it does here
stands in the README.
"""
prepare = '--scores'
curriculum = 'bigram'
pacing = 'linear'
