"""GPT-BERT (Charpentier 2024, 2410.24159): some rows fill in masked tokens, reading both ways; the rest
predict the next one.

    torchrun train.py config/babylm.py config/masked.py

The winner of BabyLM 2024. A masked token is predicted from the position before it, so that both kinds of row
ask the same of the same head. 30 % of the tokens are hidden at first, 15 % in the end. Hidden ones are the
only ones that count there, so such a row teaches on fewer tokens, and its attention runs in PyTorch, not in
the kernels. Needs a bpe tokenizer, whose unknown token is the mask. train_loss is the mixture. Expected:
helps where text is read many times, costs in a first epoch. A first look stands in the README.
"""
masked = 0.25
