"""EasyEdit: registration, its apply function, its data sets, statistics and scripts.

The only part of the package that imports ``easyeditor``, and only inside functions.
"""

from easyedit_rls.host.apply import apply_rls_to_model
from easyedit_rls.host.datasets import zsre_requests
from easyedit_rls.host.moments import write_moments
from easyedit_rls.host.registration import is_registered, register, unregister

__all__ = ["apply_rls_to_model", "is_registered", "register", "unregister", "write_moments", "zsre_requests"]
