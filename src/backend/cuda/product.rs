//! One matrix product of a linear layer in cuBLASLt's words: its types, its parts, what is done with its sums.

use std::ffi::c_void;

use cudarc::cublaslt::sys;
use half::f16;

use super::device::Pointer;

/// Most terms that are added in f16 before the sum is stored. The error of such a sum grows with the square
/// root of its length; longer ones are taken in parts, each added to what the one before it left. A part reads
/// and writes `out` once, 4 bytes for 2 * 4,096 operations.
pub(super) const F16_TERMS: usize = 4_096;

/// Parts begin at multiples of this: 256 bytes, the alignment that cuBLASLt takes for given.
const PART_STEP: usize = 128;

/// Types of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Types {
    /// Halves in and out.
    F16,
    /// The same, and sums of halves.
    F16Sums,
    /// Halves in, f32 out: gradients of weights.
    F16IntoF32,
    /// f32 in and out, without rounding to TF32.
    F32,
}

impl Types {
    /// Of both operands.
    pub fn input(self) -> sys::cudaDataType {
        match self {
            Types::F16 | Types::F16Sums | Types::F16IntoF32 => sys::cudaDataType::CUDA_R_16F,
            Types::F32 => sys::cudaDataType::CUDA_R_32F,
        }
    }

    /// Of the result, a bias and the input of GELU.
    pub fn output(self) -> sys::cudaDataType {
        match self {
            Types::F16 | Types::F16Sums => sys::cudaDataType::CUDA_R_16F,
            Types::F16IntoF32 | Types::F32 => sys::cudaDataType::CUDA_R_32F,
        }
    }

    /// What terms are added in.
    pub fn compute(self) -> sys::cublasComputeType_t {
        match self {
            Types::F16Sums => sys::cublasComputeType_t::CUBLAS_COMPUTE_16F,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        }
    }

    /// What factors of the sum are read as. The library wants f16 with f16 sums, and nothing else.
    pub fn factor(self) -> sys::cudaDataType {
        match self {
            Types::F16Sums => sys::cudaDataType::CUDA_R_16F,
            _ => sys::cudaDataType::CUDA_R_32F,
        }
    }

    fn input_bytes(self) -> usize {
        match self {
            Types::F32 => 4,
            Types::F16 | Types::F16Sums | Types::F16IntoF32 => 2,
        }
    }
}

/// `alpha` and `beta` of a product, in both types that they may be read as.
pub(super) struct Factors {
    types: Types,
    single: [f32; 2],
    half: [f16; 2],
}

impl Factors {
    /// The addresses that the library reads, good as long as this lives.
    pub fn at(&self) -> [*const c_void; 2] {
        match self.types.factor() {
            sys::cudaDataType::CUDA_R_16F => self.half.each_ref().map(|x| (&raw const *x).cast()),
            _ => self.single.each_ref().map(|x| (&raw const *x).cast()),
        }
    }
}

impl std::fmt::Display for Types {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Types::F16 => "f16",
            Types::F16Sums => "f16 with sums in f16 (model.product_sums = \"f32\" does without)",
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
        /// Whether `out` is GELU of that, and that itself goes to `pre [T, O]`.
        gelu: bool,
    },
    /// `dx [T, I] = dout [T, O] weight [O, I]`.
    Backward {
        /// Whether each value is multiplied by `gelu'` of that of `pre [T, I]`.
        gelu: bool,
    },
    /// `dweight [O, I] = dout [T, O]ᵀ x [T, I]`.
    WeightGradient,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Kind::Forward { gelu: true, .. } => "forward with GELU",
            Kind::Forward { bias: true, .. } => "forward with bias",
            Kind::Forward { bias: false, .. } => "forward",
            Kind::Backward { gelu: true } => "backward through GELU",
            Kind::Backward { gelu: false } => "backward",
            Kind::WeightGradient => "gradient of the weight",
        })
    }
}

impl Kind {
    /// Whether a bias is part of it.
    pub fn has_bias(self) -> bool {
        matches!(self, Kind::Forward { bias: true, .. })
    }

    /// Whether GELU or its gradient is part of it.
    pub fn has_gelu(self) -> bool {
        matches!(
            self,
            Kind::Forward { gelu: true, .. } | Kind::Backward { gelu: true }
        )
    }

    /// What is done with the sums, where that is anything.
    pub fn epilogue(self) -> Option<sys::cublasLtEpilogue_t> {
        use sys::cublasLtEpilogue_t as Epilogue;
        match self {
            Kind::Forward { bias, gelu } => match (bias, gelu) {
                (true, true) => Some(Epilogue::CUBLASLT_EPILOGUE_GELU_AUX_BIAS),
                (false, true) => Some(Epilogue::CUBLASLT_EPILOGUE_GELU_AUX),
                (true, false) => Some(Epilogue::CUBLASLT_EPILOGUE_BIAS),
                (false, false) => None,
            },
            Kind::Backward { gelu: true } => Some(Epilogue::CUBLASLT_EPILOGUE_DGELU),
            Kind::Backward { gelu: false } | Kind::WeightGradient => None,
        }
    }
}

/// One product. `left` and `right` are `weight` and `x`, `weight` and `dout`, or `x` and `dout`.
#[derive(Clone, Copy)]
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
    /// Read where the kind has a bias.
    pub bias: Pointer,
    /// Of the kinds with GELU: written by the forward product, read by the backward one.
    pub pre: Pointer,
}

impl Product {
    /// Columns of `out`.
    pub fn out_cols(&self) -> usize {
        match self.kind {
            Kind::Forward { .. } => self.out_features,
            Kind::Backward { .. } | Kind::WeightGradient => self.in_features,
        }
    }

    /// Terms of each value of `out`.
    fn terms(&self) -> usize {
        match self.kind {
            Kind::Forward { .. } => self.in_features,
            Kind::Backward { .. } => self.out_features,
            Kind::WeightGradient => self.rows,
        }
    }

    /// Whether it is taken at once.
    pub fn is_whole(&self) -> bool {
        self.types != Types::F16Sums || self.terms() <= F16_TERMS
    }

    /// What is queued for it, one after the other: by the number of terms alone, so that it repeats.
    pub fn parts(&self) -> impl Iterator<Item = Part> {
        let terms = self.terms();
        let count = match self.is_whole() {
            true => 1,
            false => terms.div_ceil(F16_TERMS),
        };
        let step = match count {
            1 => terms.max(1),
            _ => terms.div_ceil(count).next_multiple_of(PART_STEP),
        };
        let parts = (0..terms).step_by(step);
        parts.map(move |first| self.part(first, step.min(terms - first)))
    }

    /// The terms `first ..` of it, a bias with the first of all.
    fn part(&self, first: usize, terms: usize) -> Part {
        let later = first > 0;
        let [left, right] = match self.kind {
            Kind::Forward { .. } => [first, first],
            Kind::Backward { .. } => [first * self.in_features, first],
            Kind::WeightGradient => [0, 0],
        };
        let moved = |pointer: Pointer, values: usize| {
            Pointer(pointer.0 + (values * self.types.input_bytes()) as u64)
        };
        let product = Product {
            kind: match self.kind {
                Kind::Forward { gelu, .. } if later => Kind::Forward { bias: false, gelu },
                kind => kind,
            },
            accumulate: self.accumulate || later,
            left: moved(self.left, left),
            right: moved(self.right, right),
            ..*self
        };
        Part { product, terms }
    }

    /// `scale`, and 1 or 0 for what `out` holds.
    pub fn factors(&self) -> Factors {
        let single = [self.scale, f32::from(u8::from(self.accumulate))];
        Factors {
            types: self.types,
            single,
            half: single.map(f16::from_f32),
        }
    }
}

/// A product over some of the terms that it has been cut into.
pub(super) struct Part {
    /// The product, its operands at the first of these terms.
    pub product: Product,
    /// So many of them.
    pub terms: usize,
}
