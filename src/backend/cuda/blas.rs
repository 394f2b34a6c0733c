//! Matrix products by cuBLASLt: f16 or f32 in, f32 sums; f16 sums of halves where they are asked for.
//!
//! Micro-batches without padding have nearly every number of rows. The algorithm is chosen for the
//! number of rows rounded up to [`BUCKET`], by the library's first proposal for a fixed workspace and
//! never by timing, so that results repeat; the product itself has the exact number of rows. Whether
//! an algorithm takes it is asked once per number of rows; should one refuse, the first proposal for
//! exactly these rows is taken, which repeats as well. GELU stands in the product's epilogue where the
//! library has an algorithm for that; where it has none for a shape, the caller is told so.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::rc::Rc;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::device::{Device, Pointer};
use super::error::CudaError;
use super::memory::{CudaBuffer, Memory};
use super::product::{Kind, Part, Product, Types};
use crate::backend::{BackendError, Work};

type Result<T> = std::result::Result<T, BackendError>;

/// Rows of a micro-batch share an algorithm up to the next multiple of this.
pub(super) const BUCKET: usize = 64;

/// The library takes `pre` where its rows are a multiple of so many values.
const PRE_COLS: usize = 8;

#[derive(PartialEq, Eq, Hash)]
struct Key {
    kind: Kind,
    types: Types,
    in_features: usize,
    out_features: usize,
    /// Terms of each value, fewer than there are where the product is one part of several.
    terms: usize,
    bucket: usize,
    accumulate: bool,
}

/// A matrix in cuBLASLt's words, column after column.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(
        data: sys::cudaDataType,
        [rows, cols]: [usize; 2],
        leading: usize,
    ) -> std::result::Result<Self, CublasError> {
        result::create_matrix_layout(data, rows as u64, cols as u64, leading as i64).map(Layout)
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
    fn new(product: &Product, transposed: [bool; 2]) -> std::result::Result<Self, CublasError> {
        let types = product.types;
        let desc = result::create_matmul_desc(types.compute(), types.factor())?;
        let desc = Description(desc);
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        for (attribute, transposed) in [
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, transposed[0]),
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, transposed[1]),
        ] {
            // cublasOperation_t: 0 as it is, 1 transposed.
            desc.set(attribute, i32::from(transposed))?;
        }
        if let Some(epilogue) = product.kind.epilogue() {
            desc.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue as u32)?;
        }
        if product.kind.has_gelu() {
            let leading = product.out_cols() as i64;
            desc.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, leading)?;
        }
        desc.set_sides(product)?;
        Ok(desc)
    }

    /// Where the bias and the input of GELU are.
    fn set_sides(&self, product: &Product) -> std::result::Result<(), CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        if product.kind.has_bias() {
            let attribute = Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            self.set(attribute, product.bias.0)?;
        }
        if product.kind.has_gelu() {
            let attribute = Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER;
            self.set(attribute, product.pre.0)?;
        }
        Ok(())
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
    /// Algorithms for numbers of rows that it has refused; nothing where there is none.
    exact: HashMap<usize, Option<sys::cublasLtMatmulAlgo_t>>,
}

/// cuBLASLt on one device, with its own workspace.
pub(super) struct Blas {
    device: Rc<Device>,
    handle: sys::cublasLtHandle_t,
    workspace: CudaBuffer<u32>,
    /// Nothing for a bucket that the library has no algorithm for.
    plans: RefCell<HashMap<Key, Option<Plan>>>,
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
        match self.counted(product)? {
            true => Ok(()),
            false => {
                let none = sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED;
                Err(self.failure(product, CublasError(none)))
            }
        }
    }

    /// Queues a product with GELU; `false` where the library has no algorithm for it, and nothing was
    /// queued.
    pub fn multiply_with_gelu(&self, product: &Product) -> Result<bool> {
        if !product.out_cols().is_multiple_of(PRE_COLS) || !product.is_whole() {
            return Ok(false);
        }
        self.counted(product)
    }

    fn counted(&self, product: &Product) -> Result<bool> {
        let multiply = || {
            for part in product.parts() {
                let queued = self.try_multiply(&part);
                if !queued.map_err(|error| self.failure(product, error))? {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        self.device.counted(Work::Products, multiply)
    }

    fn failure(&self, product: &Product, error: CublasError) -> BackendError {
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

    /// Queues a part of a product, unless there is no algorithm for it: then `false`.
    fn try_multiply(&self, part: &Part) -> std::result::Result<bool, CublasError> {
        let Part { product, terms } = part;
        let bucket = product.rows.next_multiple_of(BUCKET);
        let key = Key {
            kind: product.kind,
            types: product.types,
            in_features: product.in_features,
            out_features: product.out_features,
            terms: *terms,
            bucket,
            accumulate: product.accumulate,
        };
        let mut plans = self.plans.borrow_mut();
        let plan = match plans.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(self.plan(part, bucket)?)
            }
        };
        let Some(plan) = plan else {
            return Ok(false);
        };
        plan.set_rows(product.kind, product.rows)?;
        plan.description.set_sides(product)?;
        let algorithm = match plan.exact.get(&product.rows) {
            Some(exact) => *exact,
            None if plan.agreed.contains(&product.rows) => Some(plan.algorithm),
            None if self.agrees(plan) => {
                plan.agreed.insert(product.rows);
                Some(plan.algorithm)
            }
            None => {
                let exact = self.propose(plan, product.kind)?;
                plan.exact.insert(product.rows, exact);
                exact
            }
        };
        let Some(algorithm) = algorithm else {
            return Ok(false);
        };
        let factors = product.factors();
        let [alpha, beta] = factors.at();
        let at = |pointer: Pointer| pointer.0 as *mut c_void;
        // SAFETY: handle, descriptor and layouts are alive; `factors` lives until the call has returned and
        // has the type that the descriptor was made for; the buffers have the shapes of the layouts
        // by the contract of `Product`; the workspace is used by this stream alone, in order.
        unsafe {
            result::matmul(
                self.handle,
                plan.description.0,
                alpha,
                beta,
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
        }?;
        Ok(true)
    }

    /// Description, layouts and algorithm of a bucket; nothing where there is no algorithm.
    fn plan(&self, part: &Part, bucket: usize) -> std::result::Result<Option<Plan>, CublasError> {
        let Part { product, terms } = part;
        let (t, i, o) = (bucket, product.in_features, product.out_features);
        let (input, output) = (product.types.input(), product.types.output());
        // x is as wide as the weight, dout is not.
        let right_is_x = matches!(product.kind, Kind::Forward { .. });
        // A matrix [rows, cols] of ours is [cols, rows] in columns, so every product is turned over.
        let (transposed, left, right, out) = match product.kind {
            Kind::Forward { .. } => ([true, false], [*terms, o], [*terms, t], [o, t]),
            Kind::Backward { .. } => ([false, false], [i, *terms], [*terms, t], [i, t]),
            Kind::WeightGradient => ([false, true], [i, t], [o, t], [i, o]),
        };
        let mut plan = Plan {
            description: Description::new(product, transposed)?,
            left: Layout::new(input, left, i)?,
            right: Layout::new(input, right, if right_is_x { i } else { o })?,
            out: Layout::new(output, out, product.out_cols())?,
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            agreed: HashSet::new(),
            exact: HashMap::new(),
        };
        let Some(algorithm) = self.propose(&plan, product.kind)? else {
            return Ok(None);
        };
        plan.algorithm = algorithm;
        Ok(Some(plan))
    }

    /// The library's first proposal for the layouts as they are; nothing where it has none.
    fn propose(
        &self,
        plan: &Plan,
        kind: Kind,
    ) -> std::result::Result<Option<sys::cublasLtMatmulAlgo_t>, CublasError> {
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
        };
        use sys::cublasStatus_t as Status;
        match proposal {
            Ok(proposal) => Ok(Some(proposal.algo)),
            Err(CublasError(Status::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            // What a library says that does not know the epilogue for these types.
            Err(CublasError(Status::CUBLAS_STATUS_INVALID_VALUE)) if kind.has_gelu() => Ok(None),
            Err(error) => Err(error),
        }
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
            Kind::Forward { .. } | Kind::Backward { .. } => self.out.set_cols(rows),
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
