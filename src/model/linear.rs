//! A linear layer: frozen or trained weight and bias, and a LoRA beside it where one is asked for.

use super::batch::Batch;
use super::names::LinearSite;
use super::quantised::Matrix;
use crate::adapter::Parameter;
use crate::adapter::lora::{Lora, LoraNoise, LoraScratch};
use crate::backend::{Backend, BackendError, Dropout, LinearShape, Sums};
use crate::random::{Domain, Key};

/// A tensor of the base model.
pub enum Weight<B: Backend> {
    /// Read once, never changed, no gradient.
    Frozen(B::Buffer<B::Element>),
    /// Trained with the whole model.
    Trained(Box<Parameter<B>>),
}

impl<B: Backend> Weight<B> {
    /// The values, in the storage type.
    pub fn values(&self) -> &B::Buffer<B::Element> {
        match self {
            Weight::Frozen(values) => values,
            Weight::Trained(parameter) => parameter.working(),
        }
    }

    /// The parameter, where it is trained.
    pub fn parameter(&mut self) -> Option<&mut Parameter<B>> {
        match self {
            Weight::Frozen(_) => None,
            Weight::Trained(parameter) => Some(parameter),
        }
    }

    /// Where its gradient is added up, where it is trained.
    pub fn accumulate(&mut self) -> Option<&mut B::Buffer<f32>> {
        self.parameter().map(Parameter::accumulate)
    }
}

/// Room that the linear layers of a stage share.
pub struct LinearScratch<B: Backend> {
    /// Weights of one layer out of their codes; empty where none is quantised.
    pub weight: B::Buffer<B::Element>,
    /// Low-rank activations.
    pub lora: LoraScratch<B>,
}

/// `out = x weightᵀ + bias + LoRA's share`.
pub struct Linear<B: Backend> {
    /// Which layer of the block.
    pub site: LinearSite,
    /// Index of the block in the model.
    pub layer: usize,
    /// I.
    pub in_features: usize,
    /// O.
    pub out_features: usize,
    /// `[O, I]`.
    pub weight: Matrix<B>,
    /// `[O]`, where there is one.
    pub bias: Option<Weight<B>>,
    /// Beside the weight.
    pub lora: Option<Lora<B>>,
    /// Dropout probability of the LoRA's input; 0 for none.
    pub lora_dropout: f32,
    /// How the products of the weight add; those of the LoRA add in f32.
    pub sums: Sums,
}

impl<B: Backend> Linear<B> {
    fn shape(&self, rows: usize) -> LinearShape {
        LinearShape {
            rows,
            in_features: self.in_features,
            out_features: self.out_features,
            sums: self.sums,
        }
    }

    fn noise<'a>(&self, batch: &'a Batch<B>) -> Option<LoraNoise<'a>> {
        let noise = batch.noise.filter(|_| self.lora_dropout > 0.0)?;
        let key = noise
            .key(Domain::LoraDropout)
            .fold(self.layer as u64)
            .fold(self.site as u64);
        Some(LoraNoise {
            dropout: Dropout {
                p: self.lora_dropout,
                key,
            },
            spans: &batch.spans,
        })
    }

    /// Whether anything of this layer is trained.
    pub fn is_trained(&self) -> bool {
        self.lora.is_some() || self.weight.is_trained()
    }

    /// `out [T, O]` from `x [T, I]`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn forward(
        &self,
        backend: &B,
        out: &mut B::Buffer<B::Element>,
        x: &B::Buffer<B::Element>,
        batch: &Batch<B>,
        scratch: &mut LinearScratch<B>,
    ) -> Result<(), BackendError> {
        let shape = self.shape(batch.rows);
        // LoRA's share goes first: the product of the layer adds to it in its own sums, so that `out` is
        // not read again for it.
        if let Some(lora) = &self.lora {
            let noise = self.noise(batch);
            lora.forward(backend, out, x, shape, batch.slot, &mut scratch.lora, noise)?;
        }
        let weight = self.weight.values(backend, &mut scratch.weight)?;
        let bias = self.bias.as_ref().map(Weight::values);
        let accumulate = self.lora.is_some();
        backend.linear(out, x, weight, bias, shape, 1.0, accumulate)
    }

    /// The mirror of [`Linear::forward`]: gradients of what is trained, and `dx` where wanted, added to
    /// what it holds when `accumulate`.
    ///
    /// # Errors
    /// When the device fails.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &mut self,
        backend: &B,
        mut dx: Option<&mut B::Buffer<B::Element>>,
        dout: &B::Buffer<B::Element>,
        x: &B::Buffer<B::Element>,
        batch: &Batch<B>,
        scratch: &mut LinearScratch<B>,
        accumulate: bool,
    ) -> Result<(), BackendError> {
        let shape = self.shape(batch.rows);
        if let Some(dweight) = self.weight.accumulate() {
            backend.weight_gradient(dweight, dout, x, shape, 1.0)?;
        }
        if let Some(dbias) = self.bias.as_mut().and_then(Weight::accumulate) {
            backend.bias_gradient(dbias, dout, shape)?;
        }
        let noise = self.noise(batch);
        let mut accumulate = accumulate;
        if let Some(lora) = &mut self.lora {
            let (slot, scratch) = (batch.slot, &mut scratch.lora);
            lora.gradients(backend, dout, x, shape, slot, scratch, noise)?;
            if let (Some(dx), None) = (dx.as_deref_mut(), noise) {
                lora.backward(backend, dx, shape, scratch, accumulate)?;
                accumulate = true;
            }
        }
        let Some(dx) = dx else {
            return Ok(());
        };
        let weight = self.weight.values(backend, &mut scratch.weight)?;
        backend.linear_backward(dx, dout, weight, shape, 1.0, accumulate)?;
        match (&self.lora, noise) {
            (Some(lora), Some(noise)) => {
                lora.dropped_backward(backend, dx, shape, &mut scratch.lora, noise)
            }
            _ => Ok(()),
        }
    }

    /// As [`Linear::forward`], into `pre`, and `out` is GELU of it: in one op where no LoRA adds to it.
    ///
    /// # Errors
    /// When the device fails.
    pub fn forward_gelu(
        &self,
        backend: &B,
        out: &mut B::Buffer<B::Element>,
        pre: &mut B::Buffer<B::Element>,
        x: &B::Buffer<B::Element>,
        batch: &Batch<B>,
        scratch: &mut LinearScratch<B>,
    ) -> Result<(), BackendError> {
        if self.lora.is_some() {
            self.forward(backend, pre, x, batch, scratch)?;
            return backend.gelu(out, pre, batch.rows * self.out_features);
        }
        let weight = self.weight.values(backend, &mut scratch.weight)?;
        let bias = self.bias.as_ref().map(Weight::values);
        backend.linear_gelu(out, pre, x, weight, bias, self.shape(batch.rows))
    }

    /// As [`Linear::backward`] of a layer whose input is `x = gelu(pre)`, down to the gradient of `pre`:
    /// in one op where no LoRA adds to that of `x`.
    ///
    /// # Errors
    /// When the device fails.
    #[allow(clippy::too_many_arguments)]
    pub fn backward_gelu(
        &mut self,
        backend: &B,
        dpre: Option<&mut B::Buffer<B::Element>>,
        dout: &B::Buffer<B::Element>,
        x: &B::Buffer<B::Element>,
        pre: &B::Buffer<B::Element>,
        batch: &Batch<B>,
        scratch: &mut LinearScratch<B>,
    ) -> Result<(), BackendError> {
        let Some(dpre) = dpre else {
            return self.backward(backend, None, dout, x, batch, scratch, false);
        };
        if self.lora.is_some() {
            self.backward(backend, Some(dpre), dout, x, batch, scratch, false)?;
            return backend.gelu_backward(dpre, pre, batch.rows * self.in_features);
        }
        self.backward(backend, None, dout, x, batch, scratch, false)?;
        let weight = self.weight.values(backend, &mut scratch.weight)?;
        backend.gelu_linear_backward(dpre, dout, weight, pre, self.shape(batch.rows))
    }

    /// What is trained here.
    pub fn parameters(&mut self) -> impl Iterator<Item = &mut Parameter<B>> {
        let lora = self
            .lora
            .iter_mut()
            .flat_map(|lora| [&mut lora.a, &mut lora.b]);
        let bias = self.bias.as_mut().and_then(Weight::parameter);
        let base = [self.weight.parameter(), bias];
        base.into_iter().flatten().chain(lora)
    }
}

/// Which micro-batch of which step the random numbers of training belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoiseKey {
    /// Seed of the run.
    pub seed: u64,
    /// Step of the run.
    pub step: u64,
    /// Index of the micro-batch in the whole run.
    pub micro_batch: u64,
}

impl NoiseKey {
    /// The key for one purpose in this micro-batch.
    pub fn key(&self, domain: Domain) -> Key {
        Key::new(self.seed, domain)
            .fold(self.step)
            .fold(self.micro_batch)
    }
}
