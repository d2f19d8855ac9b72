"""Plain implementations to judge the batched ones by: one fact, one prompt at a time, whole sequences, no
cache, no padding.
"""

import torch
import torch.nn.functional as F

from easyedit_rls.facts.keys import Fact
from easyedit_rls.facts.values import value_place
from easyedit_rls.model.layout import Layout


def hidden_at(model, module, ids, position, is_input=False):
    """Input or output of a module at one position of one text."""
    seen = []
    if is_input:
        handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    else:
        handle = module.register_forward_hook(
            lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    return seen[0].reshape(len(ids), -1)[position].float()


def plain_key(model, layout: Layout, fact: Fact, layer: int):
    """Key of one fact: half the bare prompt, half the mean of the others; whole sequences, target and all."""
    keys = [
        hidden_at(model, layout.edited[layer].module, row.ids, row.place, is_input=True) for row in fact.rows
    ]
    return keys[0] if len(keys) == 1 else 0.5 * keys[0] + 0.5 * torch.stack(keys[1:]).mean(0)


def plain_value(model, layout: Layout, fact: Fact, hp):
    """Value of one fact as MEMIT's compute_z states it, or with δ at the outputs of all edited MLPs; returns
    z, loss, nll, steps.
    """
    is_at_output = value_place(layout, hp) == "output"
    modules = [weight.module for weight in layout.edited.values()] if is_at_output else [layout.value_layer]

    def pushed(row, delta):
        """The model's outputs with δ, (n, d), added, and the hidden state at the value layer."""

        def adds(i):
            def add(module, args, out):
                hidden = (out[0] if isinstance(out, tuple) else out).clone()
                hidden.view(len(row.ids), -1)[row.place] += delta[i]
                return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

            return add

        seen = []
        handles = [module.register_forward_hook(adds(i)) for i, module in enumerate(modules)]
        handles.append(
            layout.value_layer.register_forward_hook(
                lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
            )
        )
        result = model(torch.tensor([row.ids])).logits[0].float()
        for handle in handles:
            handle.remove()
        return result, seen[0].reshape(len(row.ids), -1)[row.place].detach().float()

    def logits(row, delta):
        return pushed(row, delta)[0]

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    bare = fact.rows[0]
    h = torch.stack([hidden_at(model, module, bare.ids, bare.place) for module in modules])
    length = h.norm(dim=1, keepdim=True)
    delta = torch.zeros_like(h, requires_grad=True)
    rates = hp.v_lr * (length / h.shape[1] ** 0.5 if is_at_output else torch.ones_like(length))
    # a group a place: a step of Adam's is as long as its rate, whatever the gradient's scale
    adam = torch.optim.Adam(
        [
            {"params": [torch.zeros_like(place, requires_grad=True)], "lr": float(rate)}
            for place, rate in zip(h, rates)
        ],
        betas=(hp.v_momentum, 0.999),
    )
    places = [group["params"][0] for group in adam.param_groups]
    with torch.no_grad():
        essence_0 = F.log_softmax(logits(fact.kl_prompt, torch.zeros_like(h))[fact.kl_prompt.place], dim=0)

    def look(row):
        """Of one text: its NLL (the divergence for the kl_prompt prompt), by how much its target leads, and
        its gradient.
        """
        if row is fact.kl_prompt:
            kl_prompt = F.log_softmax(logits(row, delta)[row.place], dim=0)
            term, lead = (kl_prompt.exp() * (kl_prompt - essence_0)).sum(), torch.inf
        else:
            out = logits(row, delta)[row.target_start - 1 : len(row.ids) - 1]
            targets = torch.tensor(row.target)
            others = out.detach().clone()
            others[torch.arange(len(targets)), targets] = -torch.inf
            lead = float((out.detach()[torch.arange(len(targets)), targets] - others.max(1).values).min())
            term = F.cross_entropy(out, targets)
        return term.item(), lead, *torch.autograd.grad(term, delta)

    rows = [*fact.rows, *fact.statements, fact.kl_prompt]
    prompts, statements = len(fact.rows), len(fact.statements)
    share = hp.statement_share if statements else 0
    weights = [*[(1 - share) / prompts] * prompts, *[share / max(statements, 1)] * statements, hp.kl_factor]
    seen, ran = {}, {}

    def totals():
        nll = sum(weights[r] * seen[r][0] for r in range(prompts + statements))
        decay = hp.v_weight_decay * float((delta.detach().norm(dim=1, keepdim=True) / length**2).mean())
        loss = nll + hp.kl_factor * seen[len(rows) - 1][0] + decay
        leads = min(seen[r][1] for r in range(prompts))
        return (
            nll,
            loss,
            {"off": False, "loss": loss < 0.05, "argmax": leads > hp.early_stopping_margin}[
                hp.early_stopping
            ],
        )

    for step in range(hp.v_num_grad_steps):
        is_last = step == hp.v_num_grad_steps - 1
        for r, row in enumerate(rows):
            is_settled = (
                r in seen
                and row is not fact.kl_prompt
                and seen[r][0] < hp.settled_nll
                and step - ran[r] < hp.settled_every
            )
            if is_last or not is_settled:
                seen[r], ran[r] = look(row), step
        if totals()[2]:
            for r in [r for r in ran if ran[r] < step]:
                seen[r], ran[r] = look(rows[r]), step
        nll, loss, is_done = totals()
        if is_done or is_last:
            longer = hp.overshoot * delta.detach()
            longer *= (
                hp.clamp_norm_factor * length / longer.norm(dim=1, keepdim=True).clamp(min=1e-12)
            ).clamp(max=1.0)
            with torch.no_grad():
                return pushed(bare, longer)[1], loss, nll, step
        decay = hp.v_weight_decay / len(h) * F.normalize(delta.detach(), dim=1) / length**2
        whole = sum(weight * seen[r][2] for r, weight in enumerate(weights)) + decay
        with torch.no_grad():
            for place, gradient in zip(places, whole):
                place.grad = gradient.clone()
            adam.step()
            for place, radius in zip(places, hp.clamp_norm_factor * length):
                place *= (radius / place.norm().clamp(min=1e-12)).clamp(max=1.0)
            delta.copy_(torch.stack([place.detach() for place in places]))
    raise AssertionError("unreachable")
