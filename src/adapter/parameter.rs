//! A trainable tensor: its place in the whole, its values, its gradient, its moments.

use crate::backend::{AdamwTensor, Backend, BackendError, SumOf};

/// What a trainable tensor is for; decides how it starts and which silent failure to look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `lora_A [r, I]`: starts Kaiming-uniform as in PEFT; rightly without gradient while B is zero.
    LoraA,
    /// `lora_B [O, r]`: starts at zero.
    LoraB,
    /// `prefix_encoder.embedding`: starts N(0, 1).
    PrefixEmbedding,
    /// A linear layer of the prefix projection: starts uniform in ±1/sqrt(in_features), given here.
    PrefixProjection {
        /// Width of the layer's input, H.
        in_features: usize,
    },
    /// A tensor of the base model.
    Base,
}

/// The part of a full tensor that one block owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Dimension that is cut.
    pub axis: usize,
    /// First index kept.
    pub start: usize,
    /// How many are kept.
    pub len: usize,
}

/// Name, shape and role of a trainable tensor, or of one block's part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterSpec {
    /// Name in the adapter's or the model's files.
    pub name: String,
    /// Shape of the whole tensor in those files; one or two dimensions.
    pub shape: Vec<usize>,
    /// The part that this parameter holds; all of it when absent.
    pub slice: Option<Slice>,
    /// Whether weight decay applies (not to biases and norm weights).
    pub decay: bool,
    /// What it is for.
    pub role: Role,
}

impl ParameterSpec {
    /// Values held: the product of the shape, after the cut.
    pub fn len(&self) -> usize {
        let whole: usize = self.shape.iter().product();
        match self.slice {
            Some(slice) => whole / self.shape[slice.axis] * slice.len,
            None => whole,
        }
    }

    /// Whether it holds no value at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Name for messages: the tensor, and which part of it.
    pub fn title(&self) -> String {
        match self.slice {
            Some(slice) => format!(
                "{}[{}..{}]",
                self.name,
                slice.start,
                slice.start + slice.len
            ),
            None => self.name.clone(),
        }
    }

    /// For each run of values that is contiguous both here and in the whole tensor:
    /// (place here, place in the whole, length).
    fn runs(&self) -> Vec<(usize, usize, usize)> {
        let Some(slice) = self.slice else {
            return vec![(0, 0, self.len())];
        };
        let inner: usize = self.shape[slice.axis + 1..].iter().product();
        let outer: usize = self.shape[..slice.axis].iter().product();
        let run = slice.len * inner;
        (0..outer)
            .map(|i| {
                (
                    i * run,
                    (i * self.shape[slice.axis] + slice.start) * inner,
                    run,
                )
            })
            .collect()
    }

    /// Cuts this parameter's values out of the whole tensor.
    pub fn cut(&self, whole: &[f32]) -> Vec<f32> {
        self.filled(|there, part| part.copy_from_slice(&whole[there..there + part.len()]))
    }

    /// This parameter's values, made run by run: `fill` gets a place in the whole tensor and the room for
    /// the values from there on.
    pub fn filled(&self, mut fill: impl FnMut(usize, &mut [f32])) -> Vec<f32> {
        let mut part = vec![0.0; self.len()];
        for (here, there, len) in self.runs() {
            fill(there, &mut part[here..here + len]);
        }
        part
    }

    /// Puts this parameter's values back into the whole tensor.
    pub fn paste(&self, whole: &mut [f32], part: &[f32]) {
        for (here, there, len) in self.runs() {
            whole[there..there + len].copy_from_slice(&part[here..here + len]);
        }
    }
}

/// Values and moments of a parameter in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterState {
    /// f32 values. Empty: those of the tensor of that name in the base model, which need not come through
    /// host memory.
    pub values: Vec<f32>,
    /// First moment of AdamW. Empty: zeros.
    pub exp_avg: Vec<f32>,
    /// Second moment of AdamW. Empty: zeros.
    pub exp_avg_sq: Vec<f32>,
}

impl ParameterState {
    /// Values with moments of zero.
    pub fn fresh(values: Vec<f32>) -> Self {
        ParameterState {
            values,
            exp_avg: Vec::new(),
            exp_avg_sq: Vec::new(),
        }
    }

    /// The base model's own values with moments of zero.
    pub fn of_base() -> Self {
        ParameterState::fresh(Vec::new())
    }

    /// Whether the values are the base model's own.
    pub fn is_of_base(&self) -> bool {
        self.values.is_empty()
    }
}

/// A trainable tensor on its device.
pub struct Parameter<B: Backend> {
    spec: ParameterSpec,
    index: usize,
    counted: bool,
    written: bool,
    working: B::Buffer<B::Element>,
    master: B::Buffer<f32>,
    gradient: B::Buffer<f32>,
    exp_avg: B::Buffer<f32>,
    exp_avg_sq: B::Buffer<f32>,
}

impl<B: Backend> Parameter<B> {
    /// Uploads a parameter. `index` is its place in the order of all parameters of the run;
    /// `counted` is false for a copy whose owner on another stage enters the gradient norm.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn new(
        backend: &B,
        spec: ParameterSpec,
        index: usize,
        counted: bool,
        state: &ParameterState,
    ) -> Result<Self, BackendError> {
        let master = backend.upload(&state.values)?;
        Parameter::over(backend, spec, index, counted, master, state)
    }

    /// The same with values that are on the device already; those of `state` are not looked at.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn over(
        backend: &B,
        spec: ParameterSpec,
        index: usize,
        counted: bool,
        master: B::Buffer<f32>,
        state: &ParameterState,
    ) -> Result<Self, BackendError> {
        let len = spec.len();
        let mut working = backend.zeros(len)?;
        backend.cast(&mut working, &master, len)?;
        let moments = |values: &[f32]| match values {
            [] => backend.zeros(len),
            values => backend.upload(values),
        };
        Ok(Parameter {
            spec,
            index,
            counted,
            written: false,
            working,
            master,
            gradient: backend.zeros(len)?,
            exp_avg: moments(&state.exp_avg)?,
            exp_avg_sq: moments(&state.exp_avg_sq)?,
        })
    }

    /// Name, shape, role.
    pub fn spec(&self) -> &ParameterSpec {
        &self.spec
    }

    /// Place in the order of all parameters of the run.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Whether this stage enters the parameter into sums over all parameters.
    pub fn counted(&self) -> bool {
        self.counted
    }

    /// Copy in the storage type, for the matrix products.
    pub fn working(&self) -> &B::Buffer<B::Element> {
        &self.working
    }

    /// The f32 values.
    pub fn master(&self) -> &B::Buffer<f32> {
        &self.master
    }

    /// The gradient so far, f32.
    pub fn gradient(&self) -> &B::Buffer<f32> {
        &self.gradient
    }

    /// The gradient, to be added to by a backward action.
    pub fn accumulate(&mut self) -> &mut B::Buffer<f32> {
        self.written = true;
        &mut self.gradient
    }

    /// The copy in the storage type beside the gradient to be added to.
    pub fn working_and_gradient(&mut self) -> (&B::Buffer<B::Element>, &mut B::Buffer<f32>) {
        self.written = true;
        (&self.working, &mut self.gradient)
    }

    /// Whether a backward action has written the gradient since it was cleared.
    pub fn written(&self) -> bool {
        self.written
    }

    /// Starts a step: no gradient yet.
    ///
    /// # Errors
    /// When the device fails.
    pub fn clear_gradient(&mut self, backend: &B) -> Result<(), BackendError> {
        self.written = false;
        backend.clear(&mut self.gradient, self.spec.len())
    }

    /// The gradient as a term of the global norm, at this parameter's place.
    pub fn norm_term(&self) -> SumOf<'_, B> {
        SumOf {
            index: self.index,
            x: &self.gradient,
            len: self.spec.len(),
        }
    }

    /// What an optimiser step needs; `weight_decay` is taken only where decay applies.
    pub fn to_update(&mut self, weight_decay: f32) -> AdamwTensor<'_, B> {
        AdamwTensor {
            weight_decay: if self.spec.decay { weight_decay } else { 0.0 },
            len: self.spec.len(),
            working: &mut self.working,
            master: &mut self.master,
            exp_avg: &mut self.exp_avg,
            exp_avg_sq: &mut self.exp_avg_sq,
            gradient: &self.gradient,
        }
    }

    /// Reads values and moments back.
    ///
    /// # Errors
    /// When the device fails.
    pub fn state(&self, backend: &B) -> Result<ParameterState, BackendError> {
        let len = self.spec.len();
        Ok(ParameterState {
            values: backend.read(&self.master, len)?,
            exp_avg: backend.read(&self.exp_avg, len)?,
            exp_avg_sq: backend.read(&self.exp_avg_sq, len)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_out_and_go_back() {
        for (axis, start, len) in [(0, 1, 2), (1, 2, 3)] {
            let spec = ParameterSpec {
                name: "t".to_owned(),
                shape: vec![4, 5],
                slice: Some(Slice { axis, start, len }),
                decay: true,
                role: Role::Base,
            };
            let whole: Vec<f32> = (0..20).map(|i| i as f32).collect();
            let part = spec.cut(&whole);
            assert_eq!(part.len(), spec.len());
            assert_eq!(part[0], if axis == 0 { 5.0 } else { 2.0 });
            let mut back = vec![-1.0; 20];
            spec.paste(&mut back, &part);
            for (i, (&back, &whole)) in back.iter().zip(&whole).enumerate() {
                let place = if axis == 0 { i / 5 } else { i % 5 };
                let inside = (start..start + len).contains(&place);
                assert_eq!(back, if inside { whole } else { -1.0 });
            }
        }
    }
}
