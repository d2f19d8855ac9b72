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
    adam = torch.optim.Adam([delta], lr=hp.v_lr, betas=(hp.v_momentum, 0.999))
    with torch.no_grad():
        essence_0 = F.log_softmax(logits(fact.essence, torch.zeros_like(h))[fact.essence.subject_last], dim=0)

    def look(row):
        """Of one text: its NLL (the divergence for the essence prompt), by how much its target leads, and its gradient."""
        if row is fact.essence:
            essence = F.log_softmax(logits(row, delta)[row.subject_last], dim=0)
            term, lead = (essence.exp() * (essence - essence_0)).sum(), torch.inf
        else:
            out = logits(row, delta)[row.target_start - 1 : len(row.ids) - 1]
            targets = torch.tensor(row.target)
            others = out.detach().clone()
            others[torch.arange(len(targets)), targets] = -torch.inf
            lead = float((out.detach()[torch.arange(len(targets)), targets] - others.max(1).values).min())
            term = F.cross_entropy(out, targets)
        return term.item(), lead, *torch.autograd.grad(term, delta)

    rows = [*fact.rows, *fact.statements, fact.essence]
    prompts, statements = len(fact.rows), len(fact.statements)
    share = hp.statement_share if statements else 0
    weights = [*[(1 - share) / prompts] * prompts, *[share / max(statements, 1)] * statements, hp.kl_factor]
    seen, ran = {}, {}

    def totals():
        nll = sum(weights[r] * seen[r][0] for r in range(prompts + statements))
        decay = hp.v_weight_decay * float(delta.detach().norm() / h.norm() ** 2)
        loss = nll + hp.kl_factor * seen[len(rows) - 1][0] + decay
        leads = min(seen[r][1] for r in range(prompts))
        return nll, loss, {"off": False, "loss": loss < 0.05, "argmax": leads > hp.early_stopping_margin}[hp.early_stopping]

    for step in range(hp.v_num_grad_steps):
        is_last = step == hp.v_num_grad_steps - 1
        for r, row in enumerate(rows):
            is_settled = r in seen and row is not fact.essence and seen[r][0] < hp.settled_nll and step - ran[r] < hp.settled_every
            if is_last or not is_settled:
                seen[r], ran[r] = look(row), step
        if totals()[2]:
            for r in [r for r in ran if ran[r] < step]:
                seen[r], ran[r] = look(rows[r]), step
        nll, loss, is_done = totals()
        if is_done or is_last:
            longer = hp.overshoot * delta.detach()
            return h + longer * min(1.0, float(hp.clamp_norm_factor * h.norm() / longer.norm().clamp(min=1e-12))), loss, nll, step
        decay = hp.v_weight_decay * delta.detach() / delta.detach().norm().clamp(min=1e-30) / h.norm() ** 2
        delta.grad = sum(weight * seen[r][2] for r, weight in enumerate(weights)) + decay
        adam.step()
        radius = hp.clamp_norm_factor * h.norm()
        with torch.no_grad():
            if delta.norm() > radius:
                delta.mul_(radius / delta.norm())
    raise AssertionError("unreachable")
