"""Plain implementations to judge the batched ones by: one fact, one prompt at a time, whole sequences, no cache, no padding."""

import torch
import torch.nn.functional as F

from easyedit_rls.keys import Fact
from easyedit_rls.model.layout import Layout


def hidden_at(model, module, ids, position, is_input=False):
    """Input or output of a module at one position of one text."""
    seen = []
    if is_input:
        handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    return seen[0].reshape(len(ids), -1)[position].float()


def plain_key(model, layout: Layout, fact: Fact, layer: int):
    """Key of one fact: half the bare prompt, half the mean of the others; whole sequences, target and all."""
    keys = [hidden_at(model, layout.edited[layer].module, row.ids, row.subject_last, is_input=True) for row in fact.rows]
    return keys[0] if len(keys) == 1 else 0.5 * keys[0] + 0.5 * torch.stack(keys[1:]).mean(0)


def plain_value(model, layout: Layout, fact: Fact, hp):
    """Value of one fact as MEMIT's compute_z states it; returns z, loss, nll, steps."""

    def logits(row, delta):
        def add(module, args, out):
            hidden = (out[0] if isinstance(out, tuple) else out).clone()
            hidden[0, row.subject_last] += delta
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        handle = layout.value_layer.register_forward_hook(add)
        result = model(torch.tensor([row.ids])).logits[0].float()
        handle.remove()
        return result

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    bare = fact.rows[0]
    h = hidden_at(model, layout.value_layer, bare.ids, bare.subject_last)
    delta = torch.zeros_like(h, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=hp.v_lr)
    with torch.no_grad():
        essence_0 = F.log_softmax(logits(fact.essence, torch.zeros_like(h))[fact.essence.subject_last], dim=0)
    for step in range(hp.v_num_grad_steps):
        adam.zero_grad()
        nlls, leads = [], []
        for row in fact.rows:
            out = logits(row, delta)[row.target_start - 1 : len(row.ids) - 1]
            targets = torch.tensor(row.target)
            nlls.append(F.cross_entropy(out, targets))
            others = out.detach().clone()
            others[torch.arange(len(targets)), targets] = -torch.inf
            leads.append((out.detach()[torch.arange(len(targets)), targets] - others.max(1).values).min())
        nll = torch.stack(nlls).mean()
        essence = F.log_softmax(logits(fact.essence, delta)[fact.essence.subject_last], dim=0)
        kl = (essence.exp() * (essence - essence_0)).sum()
        loss = nll + hp.kl_factor * kl + hp.v_weight_decay * delta.norm() / h.norm() ** 2
        is_done = {"off": False, "loss": loss < 0.05, "argmax": min(leads) > hp.early_stopping_margin}[hp.early_stopping]
        if is_done or step == hp.v_num_grad_steps - 1:
            return h + delta.detach(), loss.item(), nll.item(), step
        loss.backward()
        adam.step()
        radius = hp.clamp_norm_factor * h.norm()
        with torch.no_grad():
            if delta.norm() > radius:
                delta.mul_(radius / delta.norm())
    raise AssertionError("unreachable")
