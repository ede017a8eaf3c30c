"""The breakdown finds the time of a known step where it was put."""

from pathlib import Path

import pytest
from made_up_traces import GEMM, RELU, cpu_trace, event, gpu_trace, threads_and_streams, write

from reco_fast.errors import ConfigError
from reco_fast.profiling.breakdown import newest_trace, read_trace
from reco_fast.profiling.trace import REGIONS


@pytest.mark.parametrize("name", ["host_1.1.pt.trace.json", "host_1.1.pt.trace.json.gz"])
def test_the_breakdown_of_a_known_step(tmp_path: Path, name: str) -> None:
    write(tmp_path, cpu_trace(3, wait=10, mm=30, norm=20, idle=40), name)
    found = read_trace(newest_trace(tmp_path))
    assert (found.device, found.steps) == ("CPU", 3)
    assert found.step_ms == pytest.approx(100)
    assert found.phases_ms == pytest.approx(dict.fromkeys(REGIONS, 0) | {"data_wait": 10, "student_forward": 90})
    assert found.other_ms == pytest.approx(0)
    assert found.busy == pytest.approx(0.5)
    assert found.matrix == pytest.approx(0.6)


# Names of CPU operators and of GPU kernels.
MATRIX_WORK = (
    "aten::mm",
    "aten::baddbmm_",
    "aten::convolution_backward",
    "reco_fast::relation_loss",
    "attend_kernel",
    "ampere_sgemm_128x64_nn",
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT",
    "nvjet_sm100_tst_64x32_64x16_2x1_2cta_v_bz_TNT",
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_"
    "execute_segment_k_off_kernel__5x_cudnn",
    "sm80_xmma_wgrad_implicit_gemm_indexed_tf32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x128x16_stage4_warpsize2x2x1",
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal<> >>",
    "sm80_xmma_fprop_image_first_layer_f16f16_f32_f16_nhwckrsc_nhwc_hmma_k64r7s7_stride2x2",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x128_32x4_nhwc_align8>()",
    "void cudnn::cnn::conv2d_grouped_direct_kernel<false, true, false, false, 0, 0, int, __nv_bfloat16, float>()",
    "void wgrad_alg0_engine<float, 128, 6, 7, 3, 3, 5, false, 512>(int, int, int, float const*)",
    "void cudnn::detail::dgrad_engine<float, 512, 6, 5, 3, 3, 3, false>(int, int, int, float const*)",
    "void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1, false, false, true>(int, int, int)",
    "cudnn_infer_ampere_scudnn_128x64_relu_xregs_large_nn_v1",
    "cudnn_infer_volta_scudnn_winograd_128x128_ldg1_ldg4_relu_tile148t_nt_v1",
    "cudnn_generated_fort_native_sdpa_sm90_knob_26_64x64x128_1x4x1_kernel0_0",
    "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4, false> >()",
    "aten::_scaled_dot_product_attention_math",
    "fmhaSm100aKernel_QkvBfloat16OBfloat16H128",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<>::Params)",
    "triton_tem_fused_mm_3",
    "triton_tem_fused__to_copy_convolution_7",
)
MEMORY_WORK = (
    "aten::batch_norm",
    "aten::sum",
    "triton_poi_fused__native_batch_norm_legit_functional_convolution_relu_12",
    "triton_red_fused_convolution_backward_native_batch_norm_backward_4",
    "triton_per_fused_addmm_mean_2",
    "triton_for_fused_2",
    "triton_unk_fused_convolution_mean_5",
    "combine_kernel",
    "void cudnn::batchnorm_fwtr_nhwc_semiPersist<__nv_bfloat16, __nv_bfloat16, float, float, 512, true, true, 0>()",
    "void cudnn::bn_bw_1C11_kernel_new<float, float, float2, 128, true, 1>(float, float, float, float)",
    "void cudnn::ops::nchwToNhwcKernel<float, float, float, false, true, (cudnnKernelDataType_t)2>()",
    "void cudnn::ops::convertTensor_kernel<float, __half, float, (cudnnKernelDataType_t)0>()",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true, true, false>()",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul> >()",
    "void at::native::(anonymous namespace)::max_pool_backward_nhwc<c10::BFloat16, float>()",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::FusedSgd>()",
    "Memcpy HtoD (Pinned -> Device)",
    "Memset (Device)",
)


@pytest.mark.parametrize(("name", "matrix"), [(name, 1) for name in MATRIX_WORK] + [(name, 0) for name in MEMORY_WORK])
def test_what_counts_as_matrix_work(tmp_path: Path, name: str, matrix: float) -> None:
    step = [event("ProfilerStep#0", "user_annotation", 0, 10), event("ProfilerStep#1", "user_annotation", 10, 10)]
    write(tmp_path, [*step, event(name, "cpu_op", 2, 5), event(name, "cpu_op", 12, 5)])
    assert read_trace(newest_trace(tmp_path)).matrix == matrix


def test_a_host_that_runs_ahead_does_not_shorten_the_step(tmp_path: Path) -> None:
    kernels = {"sm90_xmma_gemm": 60.0, "elementwise_kernel": 30.0}
    write(tmp_path, gpu_trace(5, wait=1, kernels=kernels, period=100, host=5))
    found = read_trace(newest_trace(tmp_path))
    assert found.device == "GPU"
    assert found.step_ms == pytest.approx(100)
    assert found.phases_ms["backward"] == pytest.approx(90)
    assert found.busy == pytest.approx(0.9, abs=0.03)
    assert found.matrix == pytest.approx(2 / 3)


def test_a_phase_of_a_gpu_is_what_was_launched_in_it_by_any_thread(tmp_path: Path) -> None:
    found = read_trace(write(tmp_path, threads_and_streams()))
    assert (found.device, found.steps) == ("GPU", 2)
    assert found.phases_ms == pytest.approx(
        {
            "data_wait": 10,  # the host's
            "teacher_forward": 10,
            "student_forward": 15,
            "loss": 5,
            "backward": 30,  # two kernels with 5 ms in common
            "optimizer": 5,
            "moving_average": 2,
            "enqueue": 0,
        }
    )
    assert found.step_ms == pytest.approx(100)
    assert found.busy == pytest.approx(0.71)
    assert found.other_ms == pytest.approx(2 + 3 + 1 + 1)  # loader's copy, loader's thread, no range, no launch
    assert found.operators_per_step == 9  # without those of the loader's thread
    assert found.exposed_communication == pytest.approx(0.1)


def test_kernels_that_overlap_on_a_stream_keep_their_whole_time(tmp_path: Path) -> None:
    events = gpu_trace(2, wait=0, kernels={GEMM: 10}, period=20, host=20)
    link = next(event["args"]["correlation"] for event in events if event["cat"] == "kernel")
    events.append(event(RELU, "kernel", 12, 10, thread=7, correlation=link))  # begins 1 ms before the first ends
    assert read_trace(write(tmp_path, events)).matrix == pytest.approx(20 / 30)


def test_the_end_of_a_single_recorded_step_is_the_hosts_or_its_last_kernels(tmp_path: Path) -> None:
    for host in (50, 5):
        found = read_trace(write(tmp_path, gpu_trace(1, wait=0, kernels={GEMM: 40}, period=0, host=host)))
        assert found.step_ms == pytest.approx(47 if host == 50 else 40)


def test_a_replayed_graph_outside_all_ranges_is_other(tmp_path: Path) -> None:
    events = [
        event
        for event in gpu_trace(2, wait=10, kernels={GEMM: 40, RELU: 20}, period=100, host=100)
        if event["name"] != "backward"
    ]
    found = read_trace(write(tmp_path, events))
    assert (found.step_ms, found.other_ms) == pytest.approx((100, 60))


def test_the_loaders_copies_come_early_and_do_not_begin_a_step(tmp_path: Path) -> None:
    events = gpu_trace(3, wait=5, kernels={GEMM: 90}, period=100, host=10)
    for begin in (0, 10, 20):  # by the host's clock, which is ahead of the GPU
        events.append(event("cudaMemcpyAsync", "cuda_runtime", begin + 1, 0.01, correlation=1000 + begin))
        events.append(event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", begin + 2, 1, 20, correlation=1000 + begin))
    found = read_trace(write(tmp_path, events))
    assert (found.step_ms, found.busy) == pytest.approx((100, 0.9))


def test_kernels_without_any_launch_are_no_breakdown(tmp_path: Path) -> None:
    events = [
        event for event in gpu_trace(2, wait=1, kernels={GEMM: 9}, period=10, host=10) if "uda" not in event["cat"]
    ]
    with pytest.raises(ConfigError, match="no kernel was launched"):
        read_trace(write(tmp_path, events))
