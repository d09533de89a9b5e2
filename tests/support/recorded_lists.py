"""What servers print of their devices (`--list-devices`), and of the PCI ids of these in the log of a load.

The texts are in the forms that llama.cpp gives them, with the names that drivers give.
"""

from __future__ import annotations

LISTS = {
    "none": "Available devices:\n  (none)\n",
    "cuda": """\
ggml_cuda_init: found 2 CUDA devices (Total VRAM: 48160 MiB):
  Device 0: NVIDIA GeForce RTX 3090, compute capability 8.6, VMM: yes, VRAM: 24080 MiB
  Device 1: NVIDIA GeForce RTX 3090, compute capability 8.6, VMM: yes, VRAM: 24080 MiB
Available devices:
  CUDA0: NVIDIA GeForce RTX 3090 (24080 MiB, 23802 MiB free)
  CUDA1: NVIDIA GeForce RTX 3090 (24080 MiB, 9802 MiB free)
""",
    "cuda+vulkan": """\
load_backend: loaded CUDA backend from /opt/llama/libggml-cuda.so
ggml_vulkan: Found 2 Vulkan devices:
ggml_vulkan: 0 = NVIDIA GeForce RTX 4090 (NVIDIA) | uma: 0 | fp16: 1 | bf16: 1 | warp size: 32
ggml_vulkan: 1 = Intel(R) UHD Graphics 770 (ADL-S GT1) (Intel open-source Mesa driver) | uma: 1 | fp16: 1 | bf16: 0
load_backend: loaded Vulkan backend from /opt/llama/libggml-vulkan.so
Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24080 MiB, 23660 MiB free)
  Vulkan0: NVIDIA GeForce RTX 4090 (24564 MiB, 23500 MiB free)
  Vulkan1: Intel(R) UHD Graphics 770 (ADL-S GT1) (31904 MiB, 28713 MiB free)
  BLAS: OpenBLAS (0 MiB, 0 MiB free)
""",
    "rocm": """\
ggml_cuda_init: found 1 ROCm devices:
  Device 0: AMD Radeon RX 7800 XT, gfx1101 (0x1101), VMM: no, Wave Size: 32
Available devices:
  ROCm0: AMD Radeon RX 7800 XT (gfx1101) (16368 MiB, 16288 MiB free)
""",
    "vulkan": """\
ggml_vulkan: 0 = AMD Radeon RX 7800 XT (RADV NAVI32) (radv) | uma: 0 | fp16: 1 | bf16: 0 | warp size: 64
ggml_vulkan: 1 = NVIDIA GeForce RTX 4090 (NVIDIA) | uma: 0 | fp16: 1 | bf16: 1 | warp size: 32
Available devices:
  Vulkan0: AMD Radeon RX 7800 XT (RADV NAVI32) (16368 MiB, 15601 MiB free)
  Vulkan1: NVIDIA GeForce RTX 4090 (24564 MiB, 23500 MiB free)
""",
    "apu": """\
0.00.080.143 D ggml_vulkan: Found 1 Vulkan devices:
0.00.080.212 D ggml_vulkan: 0 = AMD Radeon Graphics (RADV GFX1151) (radv) | uma: 1 | fp16: 1 | bf16: 0 | warp size: 64
Available devices:
  Vulkan0: AMD Radeon Graphics (RADV GFX1151) (64000 MiB, 62890 MiB free)
""",
    "sycl": """\
Found 2 SYCL devices:
|ID|        Device Type|                                   Name|Version|
| 0| [level_zero:gpu:0]|               Intel Arc A770 Graphics|  12.55|
| 1| [level_zero:gpu:1]|               Intel UHD Graphics 770|   12.2|
Available devices:
  SYCL0: Intel(R) Arc(TM) A770 Graphics (15473 MiB, 15000 MiB free)
  SYCL1: Intel(R) UHD Graphics 770 (51166 MiB, 51166 MiB free)
""",
    "metal": """\
ggml_metal_device_init: GPU name:   MTL0
ggml_metal_device_init: recommendedMaxWorkingSetSize  = 51539.61 MB
Available devices:
  MTL0: Apple M3 Max (49152 MiB, 49151 MiB free)
  BLAS: Accelerate (0 MiB, 0 MiB free)
""",
}
_USING = "0.00.141.906 I llama_prepare_model_devices: using device "
PLACES = {
    "cuda+vulkan": f"""\
{_USING}CUDA0 (NVIDIA GeForce RTX 4090) (0000:01:00.0) - 23660 MiB free
{_USING}Vulkan0 (NVIDIA GeForce RTX 4090) (0000:01:00.0) - 23500 MiB free
{_USING}Vulkan1 (Intel(R) UHD Graphics 770 (ADL-S GT1)) (0000:00:02.0) - 28713 MiB free
""",
    "rocm": f"{_USING}ROCm0 (AMD Radeon RX 7800 XT (gfx1101)) (0000:03:00.0) - 16288 MiB free\n",
    "vulkan": f"""\
{_USING}Vulkan0 (AMD Radeon RX 7800 XT (RADV NAVI32)) (0000:03:00.0) - 15601 MiB free
{_USING}Vulkan1 (NVIDIA GeForce RTX 4090) (0000:01:00.0) - 23500 MiB free
""",
    "apu": f"{_USING}Vulkan0 (AMD Radeon Graphics (RADV GFX1151)) (0000:c4:00.0) - 62890 MiB free\n",
    "sycl": f"{_USING}SYCL0 (Intel(R) Arc(TM) A770 Graphics) (unknown id) - 15000 MiB free\n",
}
