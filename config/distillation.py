"""Distillation (Hinton 2015, 1503.02531): half of the loss is to guess as an earlier run does.

    torchrun train.py config/babylm.py --out_dir=out/teacher
    torchrun train.py config/babylm.py config/distillation.py

BabyLlama's recipe (Timiryasov 2023, 2308.02019): half cross-entropy, half divergence from the teacher, both
softened at a temperature of 2. There two teachers' logits were averaged, and the student beat both; Kim 2025
(2509.14786): a student 8 times smaller keeps 83 % of what an ensemble gains. The teacher needs the same
vocabulary, and its own half-hour is not on this run's bill; its forward pass is, so the student sees less
text (FLOPs and MFU do not count it). train_loss is the mixture. Expected: better where text is read many
times; what happened stands in the README.
"""
teacher = 'out/teacher'
teacher_weight = 0.5
teacher_temperature = 2.0
