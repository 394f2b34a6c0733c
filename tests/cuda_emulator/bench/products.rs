//! The pretend cuBLASLt against plain loops.

use cudarc::cublaslt::{result, sys};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr};
use half::f16;
use std::sync::Arc;

use crate::gpu::bench;

/// A type of matrix elements.
trait Element: DeviceRepr + Copy + Default + 'static {
    const TYPE: sys::cudaDataType;
    fn from(value: f32) -> Self;
    fn value(self) -> f64;
}
impl Element for f32 {
    const TYPE: sys::cudaDataType = sys::cudaDataType::CUDA_R_32F;
    fn from(value: f32) -> Self {
        value
    }
    fn value(self) -> f64 {
        self.into()
    }
}
impl Element for f16 {
    const TYPE: sys::cudaDataType = sys::cudaDataType::CUDA_R_16F;
    fn from(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn value(self) -> f64 {
        self.to_f64()
    }
}

/// One product: D [m, n] = alpha op(A) op(B) + beta C, then the epilogue.
#[derive(Clone, Copy)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    transpose_a: bool,
    transpose_b: bool,
    batches: usize,
    beta: f32,
    epilogue: sys::cublasLtEpilogue_t,
}

const PLAIN: Case = Case {
    m: 37,
    n: 29,
    k: 53,
    transpose_a: false,
    transpose_b: false,
    batches: 1,
    beta: 0.0,
    epilogue: sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
};

/// Rows of padding between a matrix' columns.
const PADDING: usize = 3;

fn numbers<T: Element>(len: usize, seed: usize) -> Vec<T> {
    let number = |i: usize| ((i * 31 + seed * 17 + i / 7) % 41) as f32 / 20.0 - 1.0;
    (0..len).map(|i| T::from(number(i))).collect()
}

fn layout<T: Element>(rows: usize, columns: usize, batches: usize) -> sys::cublasLtMatrixLayout_t {
    let leading = rows + PADDING;
    let layout =
        result::create_matrix_layout(T::TYPE, rows as u64, columns as u64, leading as i64).unwrap();
    let (count, stride) = (batches as i32, (leading * columns) as i64);
    use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
    // SAFETY: both values have the sizes that the attributes have.
    unsafe {
        result::set_matrix_layout_attribute(
            layout,
            Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
            (&raw const count).cast(),
            4,
        )
        .unwrap();
        result::set_matrix_layout_attribute(
            layout,
            Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
            (&raw const stride).cast(),
            8,
        )
        .unwrap();
    }
    layout
}

/// Runs a case, checks every element and returns the bits of the result.
fn check<T: Element, D: Element>(stream: &Arc<CudaStream>, case: Case) -> Vec<u64> {
    let Case { m, n, k, .. } = case;
    let shape_a = if case.transpose_a { (k, m) } else { (m, k) };
    let shape_b = if case.transpose_b { (n, k) } else { (k, n) };
    let len = |(rows, columns): (usize, usize)| (rows + PADDING) * columns * case.batches;
    let (a, b) = (numbers::<T>(len(shape_a), 1), numbers::<T>(len(shape_b), 2));
    let (c, bias) = (numbers::<D>(len((m, n)), 3), numbers::<D>(m, 4));
    let (alpha, beta) = (0.75f32, case.beta);

    let handle = result::create_handle().unwrap();
    let product =
        result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32::TYPE)
            .unwrap();
    let [la, lb] =
        [shape_a, shape_b].map(|(rows, columns)| layout::<T>(rows, columns, case.batches));
    let ld = layout::<D>(m, n, case.batches);
    let preference = result::create_matmul_pref().unwrap();
    let on_device = |values: &[T]| -> CudaSlice<T> { stream.clone_htod(values).unwrap() };
    let (a_device, b_device) = (on_device(&a), on_device(&b));
    let (mut d_device, bias_device) = (
        stream.clone_htod(&c).unwrap(),
        stream.clone_htod(&bias).unwrap(),
    );
    use sys::cublasLtMatmulDescAttributes_t as Attribute;
    let (ta, tb) = (i32::from(case.transpose_a), i32::from(case.transpose_b));
    let bias_at = bias_device.device_ptr(stream).0;
    // SAFETY: each value has the size of its attribute, and lives during the calls; the matrices have
    // the sizes of their layouts.
    unsafe {
        for (attribute, value, bytes) in [
            (
                Attribute::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const ta).cast(),
                4,
            ),
            (
                Attribute::CUBLASLT_MATMUL_DESC_TRANSB,
                (&raw const tb).cast(),
                4,
            ),
            (
                Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
                (&raw const case.epilogue).cast(),
                4,
            ),
            (
                Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                (&raw const bias_at).cast(),
                8,
            ),
        ] {
            result::set_matmul_desc_attribute(product, attribute, value, bytes).unwrap();
        }
        let found =
            result::get_matmul_algo_heuristic(handle, product, la, lb, ld, ld, preference).unwrap();
        let d_at = d_device.device_ptr_mut(stream).0 as *mut _;
        result::matmul(
            handle,
            product,
            (&raw const alpha).cast(),
            (&raw const beta).cast(),
            a_device.device_ptr(stream).0 as *const _,
            la,
            b_device.device_ptr(stream).0 as *const _,
            lb,
            d_at,
            ld,
            d_at,
            ld,
            &raw const found.algo,
            std::ptr::null_mut(),
            0,
            stream.cu_stream().cast(),
        )
        .unwrap();
        for layout in [la, lb, ld] {
            result::destroy_matrix_layout(layout).unwrap();
        }
        result::destroy_matmul_pref(preference).unwrap();
        result::destroy_matmul_desc(product).unwrap();
        result::destroy_handle(handle).unwrap();
    }

    let d = stream.clone_dtoh(&d_device).unwrap();
    let (lead_a, lead_b, lead_d) = (shape_a.0 + PADDING, shape_b.0 + PADDING, m + PADDING);
    let with_bias = case.epilogue as u32 & 4 != 0;
    for batch in 0..case.batches {
        for column in 0..n {
            for row in 0..lead_d {
                let place = (batch * n + column) * lead_d + row;
                if row >= m {
                    assert_eq!(d[place].value(), c[place].value(), "padding");
                    continue;
                }
                let terms = (0..k).map(|i| {
                    let in_a = if case.transpose_a {
                        row * lead_a + i
                    } else {
                        i * lead_a + row
                    };
                    let in_b = if case.transpose_b {
                        i * lead_b + column
                    } else {
                        column * lead_b + i
                    };
                    a[batch * lead_a * shape_a.1 + in_a].value()
                        * b[batch * lead_b * shape_b.1 + in_b].value()
                });
                let mut expected = 0.75 * terms.sum::<f64>() + f64::from(beta) * c[place].value();
                if let Some(bias) = bias.get(row).filter(|_| with_bias) {
                    expected += bias.value();
                }
                if case.epilogue as u32 & 32 != 0 {
                    let inner = 0.797_884_560_802_865_4 * (expected + 0.044_715 * expected.powi(3));
                    expected *= 0.5 * (1.0 + inner.tanh());
                }
                let tolerance = if size_of::<D>() == 2 { 1e-3 } else { 1e-5 };
                let error = (d[place].value() - expected).abs();
                assert!(
                    error <= tolerance * expected.abs().max(1.0),
                    "row {row} column {column}: {} for {expected}",
                    d[place].value()
                );
            }
        }
    }
    d.iter().map(|value| value.value().to_bits()).collect()
}

#[test]
fn products_of_every_kind() {
    let Some(bench) = bench(&[]) else { return };
    let context = bench.device(0);
    let stream = context.new_stream().unwrap();
    use sys::cublasLtEpilogue_t::{
        CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU, CUBLASLT_EPILOGUE_GELU_BIAS,
    };
    for transpose_a in [false, true] {
        for transpose_b in [false, true] {
            let case = Case {
                transpose_a,
                transpose_b,
                ..PLAIN
            };
            check::<f16, f16>(&stream, case);
            check::<f16, f32>(&stream, Case { beta: 0.5, ..case });
            check::<f32, f32>(&stream, Case { batches: 3, ..case });
        }
    }
    for epilogue in [
        CUBLASLT_EPILOGUE_BIAS,
        CUBLASLT_EPILOGUE_GELU,
        CUBLASLT_EPILOGUE_GELU_BIAS,
    ] {
        check::<f16, f16>(&stream, Case { epilogue, ..PLAIN });
    }
    check::<f16, f16>(
        &stream,
        Case {
            m: 1,
            n: 1,
            k: 1,
            ..PLAIN
        },
    );
}

#[test]
fn an_element_does_not_depend_on_the_size_of_the_product() {
    let Some(bench) = bench(&[]) else { return };
    let context = bench.device(0);
    let stream = context.new_stream().unwrap();
    let narrow = check::<f16, f32>(&stream, Case { n: 8, ..PLAIN });
    let wide = check::<f16, f32>(&stream, PLAIN);
    let column = PLAIN.m + PADDING;
    for place in (0..8 * column).filter(|place| place % column < PLAIN.m) {
        assert_eq!(narrow[place], wide[place]);
    }
}

/// The sums of one column, rounded to half behind every fourth term, then times alpha, plus beta C.
fn half_sum(a: &[f16], b: &[f16], [alpha, beta]: [f32; 2], c: f16) -> f16 {
    let half = |x: f32| f16::from_f32(x).to_f32();
    let quads = a.chunks(4).zip(b.chunks(4));
    let sum = quads.fold(0.0f32, |sum, (a, b)| {
        let terms = a.iter().zip(b);
        half(terms.fold(sum, |sum, (a, b)| a.to_f32().mul_add(b.to_f32(), sum)))
    });
    f16::from_f32(half(alpha * sum) + half(beta * c.to_f32()))
}

#[test]
fn sums_in_half_are_rounded_on_their_way() {
    let Some(bench) = bench(&[]) else { return };
    let context = bench.device(0);
    let stream = context.new_stream().unwrap();
    const K: usize = 1001;
    let (a, b) = (numbers::<f16>(K, 1), numbers::<f16>(K, 5));
    let c = f16::from_f32(3.75);
    let factors = [0.75f32, 0.5];
    let halves = factors.map(f16::from_f32);
    let half_type = <f16 as Element>::TYPE;
    let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_16F;
    let (a_device, b_device) = (
        stream.clone_htod(&a).unwrap(),
        stream.clone_htod(&b).unwrap(),
    );
    let mut d_device = stream.clone_htod(&[c]).unwrap();
    let handle = result::create_handle().unwrap();
    let product = result::create_matmul_desc(compute, half_type).unwrap();
    let preference = result::create_matmul_pref().unwrap();
    let layout = |rows: usize, cols: usize| {
        result::create_matrix_layout(half_type, rows as u64, cols as u64, rows as i64).unwrap()
    };
    let [la, lb, ld] = [layout(1, K), layout(K, 1), layout(1, 1)];
    let [alpha, beta] = halves.each_ref().map(|x| (&raw const *x).cast());
    // SAFETY: everything is alive during the calls and destroyed once; the matrices have the sizes of their
    // layouts, alpha and beta the type of the descriptor.
    unsafe {
        let found =
            result::get_matmul_algo_heuristic(handle, product, la, lb, ld, ld, preference).unwrap();
        let d_at = d_device.device_ptr_mut(&stream).0 as *mut _;
        let (a_at, b_at) = (
            a_device.device_ptr(&stream).0 as *const _,
            b_device.device_ptr(&stream).0 as *const _,
        );
        let (none, queue) = (std::ptr::null_mut(), stream.cu_stream().cast());
        let algorithm = &raw const found.algo;
        result::matmul(
            handle, product, alpha, beta, a_at, la, b_at, lb, d_at, ld, d_at, ld, algorithm, none,
            0, queue,
        )
        .unwrap();
        for layout in [la, lb, ld] {
            result::destroy_matrix_layout(layout).unwrap();
        }
        result::destroy_matmul_pref(preference).unwrap();
        result::destroy_matmul_desc(product).unwrap();
        result::destroy_handle(handle).unwrap();
    }
    let found = stream.clone_dtoh(&d_device).unwrap()[0];
    assert_eq!(found, half_sum(&a, &b, factors, c));
    let exact: f64 = a.iter().zip(&b).map(|(a, b)| a.value() * b.value()).sum();
    let once = f16::from_f64(0.75 * exact + 0.5 * c.value());
    assert_ne!(found, once, "rounded once");
}

/// The types that `cublasLtMatmul` has no product for.
#[test]
fn sums_in_half_of_other_types_are_refused() {
    let Some(_bench) = bench(&[]) else { return };
    use sys::cublasComputeType_t::{CUBLAS_COMPUTE_16F, CUBLAS_COMPUTE_32F};
    let (half, single) = (<f16 as Element>::TYPE, <f32 as Element>::TYPE);
    let handle = result::create_handle().unwrap();
    let preference = result::create_matmul_pref().unwrap();
    let unsupported = Err(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);
    for (compute, factors, input, output, expected) in [
        (CUBLAS_COMPUTE_16F, half, half, half, Ok(())),
        (CUBLAS_COMPUTE_16F, single, half, half, unsupported),
        (CUBLAS_COMPUTE_16F, half, half, single, unsupported),
        (CUBLAS_COMPUTE_16F, half, single, single, unsupported),
        (CUBLAS_COMPUTE_32F, half, half, half, unsupported),
        (CUBLAS_COMPUTE_32F, single, half, half, Ok(())),
    ] {
        let layout = |data, rows: u64, cols: u64| {
            result::create_matrix_layout(data, rows, cols, rows as i64).unwrap()
        };
        let layouts = [
            layout(input, 64, 32),
            layout(input, 32, 16),
            layout(output, 64, 16),
        ];
        let [a, b, d] = layouts;
        let product = result::create_matmul_desc(compute, factors).unwrap();
        // SAFETY: descriptors made above, destroyed once.
        unsafe {
            let asked = result::get_matmul_algo_heuristic(handle, product, a, b, d, d, preference);
            let asked = asked.map(|_| ()).map_err(|error| error.0);
            assert_eq!(
                asked, expected,
                "{compute:?} {factors:?} {input:?} {output:?}"
            );
            for layout in layouts {
                result::destroy_matrix_layout(layout).unwrap();
            }
            result::destroy_matmul_desc(product).unwrap();
        }
    }
    // SAFETY: made above, destroyed once.
    unsafe {
        result::destroy_matmul_pref(preference).unwrap();
        result::destroy_handle(handle).unwrap();
    }
}

#[test]
fn what_cublaslt_refuses() {
    let Some(_bench) = bench(&[]) else { return };
    let layouts =
        [(64, 32, 64), (32, 16, 32), (64, 16, 64), (64, 16, 60)].map(|(rows, columns, leading)| {
            result::create_matrix_layout(f16::TYPE, rows, columns, leading).unwrap()
        });
    let [a, b, d, bad] = layouts;
    let handle = result::create_handle().unwrap();
    let product =
        result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32::TYPE)
            .unwrap();
    let preference = result::create_matmul_pref().unwrap();
    // SAFETY: descriptors made above, destroyed once.
    unsafe {
        let ask = |a, b, d| {
            result::get_matmul_algo_heuristic(handle, product, a, b, d, d, preference)
                .map(|_| ())
                .map_err(|error| error.0)
        };
        ask(a, b, d).unwrap();
        let wrong = sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE;
        assert_eq!(ask(a, b, bad).unwrap_err(), wrong);
        assert_eq!(ask(b, a, d).unwrap_err(), wrong);
        for layout in layouts {
            result::destroy_matrix_layout(layout).unwrap();
        }
        result::destroy_matmul_pref(preference).unwrap();
        result::destroy_matmul_desc(product).unwrap();
        result::destroy_handle(handle).unwrap();
    }
}
