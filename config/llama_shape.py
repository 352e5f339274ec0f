"""Llama's shape: a model that transformers and llama.cpp know, so that others can use it as it is.

    python train.py config/babylm.py config/llama_shape.py
    python sample.py out/babylm --export hf

What the baseline has and Llama (Touvron 2023, 2302.13971) has not is left away: the token shift, QK-norm with
its sharper scores, the token embedding mixed in again at every layer. The RMS-normalised embedding is kept:
the table is normalised as it is exported, and a tied head gets one of its own. config/qwen3_shape.py keeps
QK-norm. Documents are told apart in training as ever; elsewhere one is read at a time.
What it cost: 2.2143 bits per byte beside 2.2131 in a doll of config/babylm.py's half hour, one seed, with
mlp_hidden 85 for as many parameters (RESULTS.md, "Instructions, passages, exports"). Even.
"""
import torch

import model

qk_norm = False
token_shift = False
mlp = 'swiglu'
NOT_WITH = dict.fromkeys(('latent_attention', 'leaderboard', 'plain_gpt2'), 'each has a shape of its own')


class Block(model.Block):
    page = ''

    def __init__(self, config, layer):
        super().__init__(config, layer)
        del self.mix
        self.register_buffer('mix', torch.empty(2))      # 1, 0: the residual stream alone

    def hf(self):
        """{name in transformers: tensor} of a layer; a squared ReLU is relu(x) times x, its gate x itself."""
        attn, up = self.attn, self.mlp.up.weight
        gate, up = up.chunk(2) if self.mlp.gated else (up, up)
        D, ones = attn.head_dim, torch.ones(attn.q.in_features)
        tensors = {'input_layernorm': ones, 'post_attention_layernorm': ones, 'mlp.gate_proj': gate,
                   'mlp.up_proj': up, 'mlp.down_proj': self.mlp.down.weight,
                   'self_attn.q_proj': attn.q.weight, 'self_attn.k_proj': attn.k.weight,
                   'self_attn.v_proj': attn.v.weight, 'self_attn.o_proj': attn.proj.weight}
        if attn.qk_norm:                                 # scores there are divided by sqrt D
            tensors['self_attn.q_norm'] = torch.full((D,), attn.scale * D ** 0.5)
            tensors['self_attn.k_norm'] = torch.ones(D)
        return tensors


class GPT(model.GPT):
    page = ''

    def build(self, config):
        if config.token_shift:
            raise ValueError('token_shift has no equivalent in the shapes of Llama and Qwen3: leave it off')
        if config.rotary_dim != config.head_dim:
            raise ValueError(f'rotary_dim is {config.rotary_dim}, the shapes of Llama and Qwen3 turn a whole '
                             f'head: leave it 0')
        super().build(config)

    def hf(self):
        """config.json of transformers but for what the tokenizer decides, and {name: tensor}."""
        c = self.config
        about = dict(
            architectures=['Qwen3ForCausalLM' if c.qk_norm else 'LlamaForCausalLM'],
            model_type='qwen3' if c.qk_norm else 'llama', vocab_size=c.vocab_size, hidden_size=c.n_embd,
            intermediate_size=c.mlp_hidden, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, max_position_embeddings=c.block_size,
            hidden_act='silu' if c.mlp == 'swiglu' else 'relu', rms_norm_eps=1e-6, tie_word_embeddings=False,
            rope_theta=c.rope_base, rope_parameters=dict(rope_type='default', rope_theta=c.rope_base))
        tensors = {'model.embed_tokens': model.rms_norm(self.wte.weight), 'model.norm': torch.ones(c.n_embd),
                   'lm_head': self.lm_head.weight}
        for i, block in enumerate(self.blocks):
            tensors |= {f'model.layers.{i}.{name}': w for name, w in block.hf().items()}
        return about, {f'{name}.weight': w.detach() for name, w in tensors.items()}
