//! The end of a step: gradients that several stages share, agreement on norm and finiteness, update.

use super::failure::Cause;
use super::messages::{StepOutcome, StepPlan};
use crate::adapter::{Parameter, Role};
use crate::backend::{AdamwStep, AdamwTensor, Backend};
use crate::comm::Transport;
use crate::model::stage::Stage;

/// Completes gradients that more than one stage has a part in.
///
/// # Errors
/// Another stage is gone, or the device fails.
pub fn complete<B: Backend, T: Transport<B>>(
    stage: &mut Stage<B>,
    backend: &B,
    transport: &mut T,
    layers: usize,
) -> Result<(), Cause> {
    complete_tied(stage, backend, transport)?;
    complete_projection(stage, backend, transport, layers)
}

/// A tied matrix has two gradients, the embedding's and the head's, added once per step. Where they
/// arise on two stages, both get both, and both make the same update.
fn complete_tied<B: Backend, T: Transport<B>>(
    stage: &mut Stage<B>,
    backend: &B,
    transport: &mut T,
) -> Result<(), Cause> {
    let (rank, last) = (transport.rank(), transport.stages() - 1);
    let Some((parameter, other)) = stage.tied_mut() else {
        return Ok(());
    };
    let len = parameter.spec().len();
    if last > 0 {
        let peer = if rank == 0 { last } else { 0 };
        transport.trade(backend, peer, parameter.gradient(), other, len)?;
    }
    Ok(backend.add(parameter.accumulate(), other, len)?)
}

/// The layer that all blocks' prefixes share gets the sum of their gradients in block order,
/// whichever stage each block lives on.
fn complete_projection<B: Backend, T: Transport<B>>(
    stage: &mut Stage<B>,
    backend: &B,
    transport: &mut T,
    layers: usize,
) -> Result<(), Cause> {
    let own: Vec<usize> = stage.layers().collect();
    let Some(mut projection) = stage
        .prefix_mut()
        .and_then(|prefix| prefix.projection_mut())
    else {
        return Ok(());
    };
    let len = projection.hidden_len();
    projection.begin(backend)?;
    for layer in 0..layers {
        let place = own.iter().position(|&own| own == layer);
        let part = projection.block_backward(backend, place)?;
        transport.all_reduce_sum(backend, part, len)?;
        projection.add_part(backend)?;
    }
    Ok(projection.shared_backward(backend)?)
}

/// The vector on which all stages agree at the end of a step, and its size.
pub struct Agreement<B: Backend> {
    values: B::Buffer<f32>,
    parameters: usize,
    micro_batches: usize,
}

impl<B: Backend> Agreement<B> {
    /// Room for `parameters` partial norms and the loss of `micro_batches` micro-batches.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn new(backend: &B, parameters: usize, micro_batches: usize) -> Result<Self, Cause> {
        Ok(Agreement {
            values: backend.zeros(parameters + micro_batches)?,
            parameters,
            micro_batches,
        })
    }

    /// Values in the vector.
    pub fn values(&self) -> usize {
        self.parameters + self.micro_batches
    }

    /// Starts a step.
    ///
    /// # Errors
    /// When the device fails.
    pub fn clear(&mut self, backend: &B) -> Result<(), Cause> {
        let len = self.values();
        Ok(backend.clear(&mut self.values, len)?)
    }

    /// Enters the loss of a micro-batch, on the last stage.
    ///
    /// # Errors
    /// When the device fails.
    pub fn enter_loss(
        &mut self,
        backend: &B,
        micro_batch: usize,
        token_loss: &B::Buffer<f32>,
        targets: usize,
    ) -> Result<(), Cause> {
        let index = self.parameters + micro_batch;
        Ok(backend.sum(&mut self.values, index, token_loss, targets)?)
    }

    /// Sums over all stages as [`Agreement::decide`] does, waits for it, and decides nothing.
    ///
    /// # Errors
    /// Another stage is gone, or the device fails.
    pub fn rehearse<T: Transport<B>>(
        &mut self,
        backend: &B,
        transport: &mut T,
    ) -> Result<(), Cause> {
        let len = self.values();
        transport.all_reduce_sum(backend, &mut self.values, len)?;
        backend.read(&self.values, len)?;
        Ok(())
    }

    /// Enters this stage's partial norms.
    ///
    /// # Errors
    /// The device fails, or a tensor would silently not be trained.
    pub fn enter_norms(
        &mut self,
        backend: &B,
        parameters: &[&mut Parameter<B>],
        plan: &StepPlan,
    ) -> Result<(), Cause> {
        let unscale = 1.0 / plan.loss_scale;
        for parameter in parameters {
            if !parameter.written() {
                let name = parameter.spec().title();
                return Err(Cause::NeverWritten { name });
            }
        }
        let counted = parameters.iter().filter(|parameter| parameter.counted());
        let terms: Vec<_> = counted.map(|parameter| parameter.norm_term()).collect();
        Ok(backend.sum_squares(&mut self.values, &terms, unscale)?)
    }

    /// Sums over all stages, and decides: each partial norm comes from one stage, the others hold zero, so
    /// the sum is exact and the same everywhere.
    ///
    /// # Errors
    /// Another stage is gone, the device fails, or a tensor would silently not be trained.
    pub fn decide<T: Transport<B>>(
        &mut self,
        backend: &B,
        transport: &mut T,
        parameters: &[&mut Parameter<B>],
        plan: &StepPlan,
    ) -> Result<StepOutcome, Cause> {
        let len = self.values();
        transport.all_reduce_sum(backend, &mut self.values, len)?;
        let values = backend.read(&self.values, len)?;
        let (partials, loss_sums) = values.split_at(self.parameters);
        let sum: f64 = partials.iter().map(|&partial| f64::from(partial)).sum();
        let grad_norm = sum.sqrt() as f32;
        let applied = grad_norm.is_finite() && loss_sums.iter().all(|loss| loss.is_finite());
        if applied {
            refuse_zero_gradients(backend, parameters, partials)?;
        }
        Ok(StepOutcome {
            loss_sums: loss_sums.to_vec(),
            grad_norm,
            clip: clip_factor(grad_norm, plan.optimizer.max_grad_norm),
            applied,
        })
    }
}

/// `min(1, max_grad_norm / (norm + 1e-6))`, as PyTorch clips; 1 without clipping.
fn clip_factor(grad_norm: f32, max_grad_norm: f32) -> f32 {
    match max_grad_norm > 0.0 {
        true => (max_grad_norm / (grad_norm + 1e-6)).min(1.0),
        false => 1.0,
    }
}

/// lora_A is rightly without gradient while lora_B is zero, and a row of the base may be unused; a
/// lora_B or a prefix without any is the sign of a run that learns nothing.
fn refuse_zero_gradients<B: Backend>(
    backend: &B,
    parameters: &[&mut Parameter<B>],
    partials: &[f32],
) -> Result<(), Cause> {
    for parameter in parameters {
        let spec = parameter.spec();
        if matches!(spec.role, Role::LoraA | Role::Base) || partials[parameter.index()] > 0.0 {
            continue;
        }
        // Squares of tiny values vanish in f32, so the gradient itself has the last word.
        let gradient = backend.read(parameter.gradient(), spec.len())?;
        if gradient.iter().all(|&value| value == 0.0) {
            return Err(Cause::ZeroGradient { name: spec.title() });
        }
    }
    Ok(())
}

/// AdamW on everything that is trained on this stage.
///
/// # Errors
/// When the device fails.
pub fn update<B: Backend>(
    backend: &B,
    parameters: Vec<&mut Parameter<B>>,
    plan: &StepPlan,
    outcome: &StepOutcome,
) -> Result<(), Cause> {
    let optimizer = &plan.optimizer;
    let t = (plan.updates + 1) as f64;
    let correction = |beta: f32| (1.0 - f64::from(beta).powf(t)) as f32;
    let step = AdamwStep {
        learning_rate: plan.learning_rate as f32,
        beta1: optimizer.beta1,
        beta2: optimizer.beta2,
        eps: optimizer.eps,
        bias_correction1: correction(optimizer.beta1),
        bias_correction2: correction(optimizer.beta2),
        gradient_scale: outcome.clip / plan.loss_scale,
    };
    let mut tensors: Vec<AdamwTensor<'_, B>> = parameters
        .into_iter()
        .map(|parameter| parameter.to_update(optimizer.weight_decay))
        .collect();
    Ok(backend.adamw(&mut tensors, step)?)
}
