"""Fine-tunes the quickstart on questions: a document is a story, a question about it and the answer.

    python train.py config/quickstart.py && python train.py config/quickstart.py config/instructions.py

It starts from the weights of out/quickstart, so it stacks on that config for the shape, and the data is
prepared with that run's tokenizer. The rate is a quarter of the one that learned the stories. The closing
report's coherence is then: of two answers, which one is true? In Swedish: quickstart_sv.py instead, and
--dataset=instructions_sv --init_from=out/quickstart_sv.
"""
from config.stories import Corpus

dataset = 'instructions'
init_from = 'out/quickstart'
learning_rate = 0.002
