import torch, torch.nn.functional as F, pytest
from torch import nn
from kenotron.parallel.collectives import *
from kenotron.parallel.vocab import *
import test_vocab as t
class M(nn.Module):
    def __init__(s, W):
        super().__init__(); s.l=nn.Linear(t.H,t.H,dtype=W.dtype); s.head=nn.Linear(t.H,W.shape[0],bias=False,dtype=W.dtype)
        with torch.no_grad(): s.head.weight.copy_(W); s.l.weight.copy_(torch.eye(t.H)); s.l.bias.zero_()
    def forward(s,x,y=None):
        h=s.l(x).tanh()
        logits=s.head(h)
        if y is None: return logits
        return t.ForCausalLMLoss(logits,y,t.V), logits
def case(group, inside, disable):
    import os
    b=t.Batch(torch.float32)
    ref=M(b.weight)
    m=M(b.weight.chunk(group.size())[group.rank()])
    wrap=lambda mod,a,o: VocabParallelLogits.from_local(o,group)
    if disable: wrap=torch.compiler.disable(wrap)
    m.head.register_forward_pre_hook(lambda mod,a: (copy_to(a[0],group),))
    m.head.register_forward_hook(wrap)
    torch._dynamo.reset()
    c=torch.compile(m,backend="aot_eager")
    for i in range(2):
        if inside:
            l,_=c(b.x,b.gaps); l2,_=ref(b.x,b.gaps)
        else:
            l=t.ForCausalLMLoss(c(b.x),b.gaps,t.V); l2=t.ForCausalLMLoss(ref(b.x),b.gaps,t.V)
        m.zero_grad(); ref.zero_grad(); l.backward(); l2.backward()
        torch.testing.assert_close(l,l2)
        torch.testing.assert_close(m.l.weight.grad,ref.l.weight.grad)
@pytest.mark.parametrize("disable",[0,1])
@pytest.mark.parametrize("inside",[0,1])
def test_c(ranks,inside,disable): ranks(case,inside,disable)
def full(group):
    import test_collectives as tc
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(group.rank())
    x, w, v = (torch.randn(s, generator=generator, requires_grad=True) for s in ((2, 3, 4), (4, 6), (6, 4)))
    eager = torch.autograd.grad(tc._column_row(x, w, v, group), (x, w, v))
    step = torch.compile(tc._column_row, backend="aot_eager",fullgraph=True)
    for expected, actual in zip(eager, torch.autograd.grad(step(x, w, v, group), (x, w, v)), strict=True):
            torch.testing.assert_close(actual, expected)
def test_full(ranks): ranks(full)
