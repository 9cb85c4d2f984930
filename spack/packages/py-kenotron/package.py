# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

from spack.package import *


class PyKenotron(PythonPackage, CudaPackage):
    """Pretraining of large transformers on 4D parallelism from ordinary Lightning code."""

    # The recipe stands in the repository that it builds.
    git = f"file://{Path(__file__).resolve().parents[3]}"
    homepage = git

    license("Apache-2.0")

    version("main", branch="main")

    variant("flash-attn", default=False, description="Attention by flash-attn where it serves", when="+cuda")
    variant("deepspeed", default=False, description="DeepSpeed's strategy to compare with")
    variant("data", default=True, description="Corpora from URLs, Parquet and .zst")
    variant("plots", default=False, description="The picture of kenotron compare")

    depends_on("cxx", type="build")  # C++20
    depends_on("python@3.11:", type=("build", "run"))
    depends_on("cmake@3.26:", type="build")
    depends_on("ninja", type="build")
    depends_on("py-scikit-build-core@1:", type="build")
    depends_on("py-nanobind@2.9:", type="build")

    # CUDA itself is opened at run time: what decides is how torch was built.
    depends_on("py-torch@2.11:", type=("build", "run"))
    depends_on("py-torch+cuda+nccl+distributed", type=("build", "run"), when="+cuda")
    depends_on("py-torch~cuda+gloo+distributed", type=("build", "run"), when="~cuda")
    for arch in CudaPackage.cuda_arch_values:
        depends_on(f"py-torch cuda_arch={arch}", type=("build", "run"), when=f"+cuda cuda_arch={arch}")

    # 2.6.2 and 2.6.3 were withdrawn: their uploads had been tampered with.
    depends_on("py-lightning@2.6:2.6.1,2.6.4:", type=("build", "run"))
    depends_on("py-torchmetrics", type=("build", "run"))
    depends_on("py-safetensors", type=("build", "run"))
    depends_on("py-transformers@5:", type=("build", "run"))
    depends_on("py-tensorboard", type=("build", "run"))
    depends_on("py-numpy", type=("build", "run"))
    depends_on("py-rich", type=("build", "run"))
    depends_on("py-jsonargparse+signatures", type=("build", "run"))

    depends_on("py-flash-attn", type=("build", "run"), when="+flash-attn")
    depends_on("py-deepspeed", type=("build", "run"), when="+deepspeed")
    with when("+data"):
        depends_on("py-fsspec", type=("build", "run"))
        depends_on("py-pyarrow", type=("build", "run"))
        depends_on("py-zstandard", type=("build", "run"))
    depends_on("py-matplotlib", type=("build", "run"), when="+plots")

    import_modules = ["kenotron", "kenotron.strategies", "kenotron.callbacks", "kenotron.callbacks_native"]
