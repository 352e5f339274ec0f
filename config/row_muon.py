"""Muon on rows of one length: before the update is orthogonalised, each row of it is divided by its norm.

    torchrun train.py config/babylm.py config/row_muon.py

Whence: the slowrun leaderboard's MuonEq-R (2026), which reports 0.003 to 0.009 nats where text is read sixteen
times. Newton-Schulz steps are few, so what they make of small singular values depends on how uneven the rows
were. Expected: a third of a percent. What it did in dolls of the half hour (RESULTS.md, "Dolls"): of config/babylm.py,
65,576 parameters, 0.7 and 0.2 % better (seeds 1, 2), 97,328 0.2 % (one); of config/tinystories.py, 40,000, 0.5 % (one).
Ahead every time, by no more than seeds differ, and less in the larger doll.
"""
import train

NOT_WITH = dict.fromkeys(('leaderboard', 'plain_gpt2'), 'AdamW moves all that it has')


class Run(train.Run):

    def muon(self):

        class RowMuon(super().muon()):

            def toward(self, average):
                return super().toward(average / average.norm(dim=-1, keepdim=True).clamp(min=1e-12))

        return RowMuon
