//! Matrix products by cuBLASLt: f16 or f32 in, f32 sums.
//!
//! Micro-batches without padding have nearly every number of rows. The algorithm is chosen for the
//! number of rows rounded up to [`BUCKET`], by the library's first proposal for a fixed workspace and
//! never by timing, so that results repeat; the product itself has the exact number of rows. Whether
//! an algorithm takes it is asked once per number of rows; should one refuse, the first proposal for
//! exactly these rows is taken, which repeats as well.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::rc::Rc;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::device::{Device, Pointer};
use super::error::CudaError;
use super::memory::{CudaBuffer, Memory};
use crate::backend::{BackendError, Work};

type Result<T> = std::result::Result<T, BackendError>;

/// Rows of a micro-batch share an algorithm up to the next multiple of this.
pub(super) const BUCKET: usize = 64;

/// Types of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Types {
    /// Halves in and out.
    F16,
    /// Halves in, f32 out: gradients of weights.
    F16IntoF32,
    /// f32 in and out, without rounding to TF32.
    F32,
}

impl Types {
    fn input(self) -> sys::cudaDataType {
        match self {
            Types::F16 | Types::F16IntoF32 => sys::cudaDataType::CUDA_R_16F,
            Types::F32 => sys::cudaDataType::CUDA_R_32F,
        }
    }

    fn output(self) -> sys::cudaDataType {
        match self {
            Types::F16 => sys::cudaDataType::CUDA_R_16F,
            Types::F16IntoF32 | Types::F32 => sys::cudaDataType::CUDA_R_32F,
        }
    }
}

impl std::fmt::Display for Types {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Types::F16 => "f16",
            Types::F16IntoF32 => "f16 into f32",
            Types::F32 => "f32",
        })
    }
}

/// Which product of a linear layer. Letters: T rows, I in_features, O out_features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// `out [T, O] = x [T, I] weight [O, I]ᵀ`, with a bias `[O]` or not.
    Forward {
        /// Whether a bias is added.
        bias: bool,
    },
    /// `dx [T, I] = dout [T, O] weight [O, I]`.
    Backward,
    /// `dweight [O, I] = dout [T, O]ᵀ x [T, I]`.
    WeightGradient,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Kind::Forward { bias: true } => "forward with bias",
            Kind::Forward { bias: false } => "forward",
            Kind::Backward => "backward",
            Kind::WeightGradient => "gradient of the weight",
        })
    }
}

/// One product. `left` and `right` are `weight` and `x`, `weight` and `dout`, or `x` and `dout`.
pub(super) struct Product {
    pub kind: Kind,
    pub types: Types,
    /// T.
    pub rows: usize,
    /// I.
    pub in_features: usize,
    /// O.
    pub out_features: usize,
    pub scale: f32,
    /// Whether the product is added to what `out` holds.
    pub accumulate: bool,
    pub out: Pointer,
    pub left: Pointer,
    pub right: Pointer,
    /// Read with `Kind::Forward { bias: true }` alone.
    pub bias: Pointer,
}

#[derive(PartialEq, Eq, Hash)]
struct Key {
    kind: Kind,
    types: Types,
    in_features: usize,
    out_features: usize,
    bucket: usize,
    accumulate: bool,
}

/// A matrix in cuBLASLt's words, column after column.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(
        data: sys::cudaDataType,
        rows: usize,
        cols: usize,
    ) -> std::result::Result<Self, CublasError> {
        result::create_matrix_layout(data, rows as u64, cols as u64, rows as i64).map(Layout)
    }

    fn set_cols(&self, cols: usize) -> std::result::Result<(), CublasError> {
        let cols = cols as u64;
        // SAFETY: the layout is alive; the attribute is 64 bits.
        unsafe {
            result::set_matrix_layout_attribute(
                self.0,
                sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_COLS,
                (&raw const cols).cast(),
                size_of::<u64>(),
            )
        }
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new(transposed: [bool; 2], bias: bool) -> std::result::Result<Self, CublasError> {
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let desc = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?;
        let desc = Description(desc);
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        for (attribute, transposed) in [
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, transposed[0]),
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, transposed[1]),
        ] {
            // cublasOperation_t: 0 as it is, 1 transposed.
            desc.set(attribute, i32::from(transposed))?;
        }
        if bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            desc.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue as u32)?;
        }
        Ok(desc)
    }

    fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: T,
    ) -> std::result::Result<(), CublasError> {
        // SAFETY: the descriptor is alive; callers give values of the attribute's type.
        unsafe {
            result::set_matmul_desc_attribute(
                self.0,
                attribute,
                (&raw const value).cast(),
                size_of::<T>(),
            )
        }
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// What a bucket of products shares.
struct Plan {
    description: Description,
    left: Layout,
    right: Layout,
    out: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
    /// Numbers of rows that the algorithm has agreed to.
    agreed: HashSet<usize>,
    /// Algorithms for numbers of rows that it has refused.
    exact: HashMap<usize, sys::cublasLtMatmulAlgo_t>,
}

/// cuBLASLt on one device, with its own workspace.
pub(super) struct Blas {
    device: Rc<Device>,
    handle: sys::cublasLtHandle_t,
    workspace: CudaBuffer<u32>,
    plans: RefCell<HashMap<Key, Plan>>,
}

/// Bytes of the workspace by compute capability (times ten); the larger one where that is not known.
/// NVIDIA's advice: 32 MiB on Hopper, 4 MiB before.
pub(super) fn workspace_bytes(capability: Option<u32>) -> usize {
    match capability {
        Some(capability) if capability < 90 => 4 << 20,
        _ => 32 << 20,
    }
}

impl Blas {
    pub fn new(device: &Rc<Device>, memory: &Memory) -> Result<Self> {
        let bytes = workspace_bytes(Some(device.capability()));
        let workspace = memory.buffer(bytes / 4)?;
        let handle = result::create_handle().map_err(|error| {
            BackendError::Cuda(CudaError::Call {
                ordinal: device.ordinal(),
                call: "cublasLtCreate",
                reason: format!("{:?}", error.0),
            })
        })?;
        Ok(Blas {
            device: Rc::clone(device),
            handle,
            workspace,
            plans: RefCell::new(HashMap::new()),
        })
    }

    /// Queues a product.
    pub fn multiply(&self, product: &Product) -> Result<()> {
        let multiply = || {
            self.try_multiply(product)
                .map_err(|error| self.refusal(product, error))
        };
        self.device.counted(Work::Products, multiply)
    }

    fn refusal(&self, product: &Product, error: CublasError) -> BackendError {
        if error.0 == sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED {
            return BackendError::Cuda(CudaError::NoMemory {
                ordinal: self.device.ordinal(),
                call: "cuBLASLt",
            });
        }
        BackendError::Cuda(CudaError::Product {
            ordinal: self.device.ordinal(),
            shape: format!(
                "{}, {} rows, {} in_features, {} out_features, {}",
                product.kind,
                product.rows,
                product.in_features,
                product.out_features,
                product.types
            ),
            reason: format!("{:?}", error.0),
        })
    }

    fn try_multiply(&self, product: &Product) -> std::result::Result<(), CublasError> {
        let bucket = product.rows.next_multiple_of(BUCKET);
        let key = Key {
            kind: product.kind,
            types: product.types,
            in_features: product.in_features,
            out_features: product.out_features,
            bucket,
            accumulate: product.accumulate,
        };
        let mut plans = self.plans.borrow_mut();
        let plan = match plans.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(self.plan(product, bucket)?)
            }
        };
        plan.set_rows(product.kind, product.rows)?;
        let algorithm = match plan.exact.get(&product.rows) {
            Some(exact) => *exact,
            None if plan.agreed.contains(&product.rows) => plan.algorithm,
            None if self.agrees(plan) => {
                plan.agreed.insert(product.rows);
                plan.algorithm
            }
            None => {
                let exact = self.propose(plan)?;
                plan.exact.insert(product.rows, exact);
                exact
            }
        };
        if let Kind::Forward { bias: true } = product.kind {
            let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            plan.description.set(attribute, product.bias.0)?;
        }
        let (alpha, beta) = (product.scale, f32::from(u8::from(product.accumulate)));
        let at = |pointer: Pointer| pointer.0 as *mut c_void;
        // SAFETY: handle, descriptor and layouts are alive; the buffers have the shapes of the layouts
        // by the contract of `Product`; the workspace is used by this stream alone, in order.
        unsafe {
            result::matmul(
                self.handle,
                plan.description.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                at(product.left),
                plan.left.0,
                at(product.right),
                plan.right.0,
                at(product.out),
                plan.out.0,
                at(product.out),
                plan.out.0,
                &raw const algorithm,
                at(self.workspace.at()),
                self.workspace.len() * 4,
                self.device.stream().cast(),
            )
        }
    }

    /// Description, layouts and algorithm of a bucket.
    fn plan(&self, product: &Product, bucket: usize) -> std::result::Result<Plan, CublasError> {
        let (t, i, o) = (bucket, product.in_features, product.out_features);
        let (input, output) = (product.types.input(), product.types.output());
        // A matrix [rows, cols] of ours is [cols, rows] in columns, so every product is turned over.
        let (transposed, left, right, out) = match product.kind {
            Kind::Forward { .. } => ([true, false], (i, o), (i, t), (o, t)),
            Kind::Backward => ([false, false], (i, o), (o, t), (i, t)),
            Kind::WeightGradient => ([false, true], (i, t), (o, t), (i, o)),
        };
        let bias = matches!(product.kind, Kind::Forward { bias: true });
        let mut plan = Plan {
            description: Description::new(transposed, bias)?,
            left: Layout::new(input, left.0, left.1)?,
            right: Layout::new(input, right.0, right.1)?,
            out: Layout::new(output, out.0, out.1)?,
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            agreed: HashSet::new(),
            exact: HashMap::new(),
        };
        plan.algorithm = self.propose(&plan)?;
        Ok(plan)
    }

    /// The library's first proposal for the layouts as they are.
    fn propose(&self, plan: &Plan) -> std::result::Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        struct Preference(sys::cublasLtMatmulPreference_t);
        impl Drop for Preference {
            fn drop(&mut self) {
                // SAFETY: made below, destroyed once.
                let _ = unsafe { result::destroy_matmul_pref(self.0) };
            }
        }
        let preference = Preference(result::create_matmul_pref()?);
        let bytes = self.workspace.len() * 4;
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        // SAFETY: the preference is alive; the attribute is a size_t.
        unsafe {
            result::set_matmul_pref_attribute(
                preference.0,
                Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const bytes).cast(),
                size_of::<usize>(),
            )
        }?;
        // SAFETY: everything given is alive.
        let proposal = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle,
                plan.description.0,
                plan.left.0,
                plan.right.0,
                plan.out.0,
                plan.out.0,
                preference.0,
            )
        }?;
        Ok(proposal.algo)
    }

    /// Whether the bucket's algorithm takes the layouts as they are, within the workspace.
    fn agrees(&self, plan: &Plan) -> bool {
        let mut answer = std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: everything given is alive; `answer` has room for the result, all of whose bit
        // patterns in zeroed memory are valid (status 0 is CUBLAS_STATUS_SUCCESS).
        let (status, answer) = unsafe {
            let status = sys::cublasLtMatmulAlgoCheck(
                self.handle,
                plan.description.0,
                plan.left.0,
                plan.right.0,
                plan.out.0,
                plan.out.0,
                &raw const plan.algorithm,
                answer.as_mut_ptr(),
            );
            (status, answer.assume_init())
        };
        status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
            && answer.workspaceSize <= self.workspace.len() * 4
    }
}

impl Plan {
    fn set_rows(&self, kind: Kind, rows: usize) -> std::result::Result<(), CublasError> {
        self.right.set_cols(rows)?;
        match kind {
            Kind::Forward { .. } | Kind::Backward => self.out.set_cols(rows),
            Kind::WeightGradient => self.left.set_cols(rows),
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.borrow_mut().clear();
        // Products may be under way; errors here are seen by the next call that matters.
        if self.device.synchronize().is_err() && self.device.pulse().is_stopped() {
            // The library may wait for the GPU, and this one may never answer.
            return;
        }
        // SAFETY: made by `new`, used by nobody after this.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
