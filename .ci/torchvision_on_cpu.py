"""Lets PyPI's torchvision be imported beside a torch that has no CUDA.

open_clip and timm need torchvision, and transformers and diffusers import it where it is installed.
Its wheel on PyPI is compiled against CUDA, so beside a CPU-only torch its C++ extension cannot be
loaded and `import torchvision` stops at the fake kernels of two operators that nobody declared.
`make` puts this module into its own .venv, with a .pth file that imports it at interpreter start;
it declares the two operators just before torchvision looks for them. They still cannot be *called*
without the extension; nothing here does. It never goes into the wheel.
"""

import sys

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareOperators:
    """A finder that finds nothing: it acts when `torchvision._meta_registrations` is looked up."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            sys.meta_path.remove(cls)
            torch, extension = sys.modules["torch"], sys.modules["torchvision.extension"]
            if torch.version.cuda is None and not extension._has_ops():
                for operator in ("torchvision::nms", "torchvision::qnms"):
                    torch.library.define(operator, SCHEMA)
        return None


sys.meta_path.insert(0, DeclareOperators)
