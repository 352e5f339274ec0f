"""Multi-token prediction (Gloeckle 2024, 2404.19737): training predicts the token after next as well.

    torchrun train.py config/babylm.py config/multi_token.py

One more matrix turns the last hidden state into that token's, under the same head; never across a document's
end. Its loss counts ahead_weight times, less and less, so that the run ends on the next token alone;
train_loss contains it, bits per byte do not. The head is computed twice: for babylm.py's shape 22 % more
FLOPs a token (counted), 0.9 % more parameters, in training alone. Reported: better code at billions of
parameters, not below; negative in nanochat's log. Expected to lose at this size, as it did in the first look
that stands in the README.
"""
predict_ahead = 1
