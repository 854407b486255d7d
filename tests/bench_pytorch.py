#!/usr/bin/env python3
"""bench_pytorch.py - the same FoX (Pro) in PyTorch eager on the CPU, to time beside `fox-graph bench`.

    python3 tests/bench_pytorch.py [--threads N] [--rounds N] [--fox-graph BINARY MODEL]

Attention is scaled_dot_product_attention with the gate's bias and the causal mask as additive mask.
Prints the median seconds of a training step (forward, backward, clipping, AdamW; width 256, 4 layers,
4 heads, context 512, batch 8, vocabulary 256, fp32) and of decoding one token of one sequence with a
cache.  With --fox-graph, rounds of the two programs alternate and the ratios are printed.
Not needed to build or run fox-graph; it needs PyTorch 2.x."""
import argparse, json, statistics, subprocess, time
import torch
import torch.nn.functional as F
from torch import nn

V, D, L, H, T, B, I = 256, 256, 4, 4, 512, 8, 768
d = D // H


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        lin = lambda n, m: nn.Linear(n, m, bias=False)
        self.n1, self.n2 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.q, self.k, self.v, self.g, self.o = lin(D, D), lin(D, D), lin(D, D), lin(D, D), lin(D, D)
        self.ks, self.vs, self.f = lin(D, H), lin(D, H), nn.Linear(D, H)
        self.qn, self.kn, self.on = (nn.Parameter(torch.ones(D)) for _ in range(3))
        self.up, self.down = lin(D, 2 * I), lin(I, D)

    def heads_norm(self, x, w, eps):
        b, t, _ = x.shape
        return F.rms_norm(x.view(b, t, H, d), (d,), eps=eps) * w.view(H, d)

    def shift(self, x, a, prev):
        b, t, _ = x.shape
        x4 = x.view(b, t, H, d)
        last = torch.cat([prev.view(b, 1, H, d), x4[:, :-1]], 1)
        a = a.unsqueeze(-1)
        return (a * last + (1 - a) * x4).view(b, t, D)

    def forward(self, x, cache=None):
        b, t, _ = x.shape
        u = F.rms_norm(x, (D,), self.n1, 1e-6)
        k0, v0 = self.k(u), self.v(u)
        zero = x.new_zeros(b, D)
        k = self.shift(k0, torch.sigmoid(self.ks(u)), cache["ks"] if cache else zero)
        v = self.shift(v0, torch.sigmoid(self.vs(u)), cache["vs"] if cache else zero)
        q = self.heads_norm(self.q(u), self.qn, 1e-5).transpose(1, 2)
        k = self.heads_norm(k, self.kn, 1e-5).transpose(1, 2)
        v = v.view(b, t, H, d).transpose(1, 2)
        lf = F.logsigmoid(self.f(u)).transpose(1, 2)
        if cache:
            n = cache["n"]
            cache["K"][:, :, n:n + t], cache["V"][:, :, n:n + t], cache["F"][:, :, n:n + t] = k, v, lf
            cache["ks"], cache["vs"], cache["n"] = k0[:, -1], v0[:, -1], n + t
            k, v, lf = cache["K"][:, :, :n + t], cache["V"][:, :, :n + t], cache["F"][:, :, :n + t]
        c = lf.cumsum(-1)
        mask = c[:, :, -t:, None] - c[:, :, None, :]
        if t > 1:
            mask = mask + torch.full((t, t), float("-inf")).triu(1)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        o = self.heads_norm(o.reshape(b, t, D), self.on, 1e-6).reshape(b, t, D)
        x = x + self.o(o * torch.sigmoid(self.g(u)))
        m = self.up(F.rms_norm(x, (D,), self.n2, 1e-6))
        return x + self.down(F.silu(m[..., :I]) * m[..., I:])


class Fox(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(L)), nn.Parameter(torch.ones(D))

    def forward(self, ids, caches=None):
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i] if caches else None)
        return self.head(F.rms_norm(x, (D,), self.norm, 1e-6))


def train_steps(model, opt, n):
    times = []
    for _ in range(n):
        ids = torch.randint(V, (B, T + 1))
        start = time.perf_counter()
        opt.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(ids[:, :-1]).reshape(-1, V), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def decode(model, prompt, n):
    size = prompt + n
    caches = [dict(K=torch.zeros(1, H, size, d), V=torch.zeros(1, H, size, d), F=torch.zeros(1, H, size),
                   ks=torch.zeros(1, D), vs=torch.zeros(1, D), n=0) for _ in range(L)]
    token = model(torch.randint(V, (1, prompt)), caches)[:, -1].argmax(-1, keepdim=True)
    times = []
    for _ in range(n):
        start = time.perf_counter()
        token = model(token, caches)[:, -1].argmax(-1, keepdim=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--threads", type=int, default=torch.get_num_threads())
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--steps", type=int, default=3)
    ap.add_argument("--fox-graph", nargs=argparse.REMAINDER, help="last: command line of `fox-graph bench ... --json`")
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    model = Fox()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, 0, 0.02)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    train_steps(model, opt, 1)
    ours_train, ours_decode, train, dec = [], [], [], []
    for _ in range(a.rounds):
        train.append(train_steps(model, opt, a.steps))
        dec.append(decode(model, 128, 64))
        if a.fox_graph:
            r = json.loads(subprocess.run(a.fox_graph, check=True, capture_output=True, text=True).stdout)
            ours_train.append(r["step_seconds"])
            ours_decode.append(r["decode_seconds"])
    m = statistics.median
    print(f"torch {torch.__version__}, {a.threads} threads: step {m(train) * 1e3:.1f} ms "
          f"({B * T / m(train):.0f} tokens/s), decode {m(dec) * 1e3:.3f} ms ({1 / m(dec):.0f} tokens/s)")
    if ours_train:
        print(f"fox-graph: step {m(ours_train) * 1e3:.1f} ms ({B * T / m(ours_train):.0f} tokens/s), "
              f"decode {m(ours_decode) * 1e3:.3f} ms ({1 / m(ours_decode):.0f} tokens/s)")
        print(f"ratio: training {m(train) / m(ours_train):.2f}x, decoding {m(dec) / m(ours_decode):.2f}x")


main()
