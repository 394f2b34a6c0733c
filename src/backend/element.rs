//! What a buffer can hold.

use half::f16;

/// A plain value that can lie in a buffer: no padding, any bit pattern valid.
pub trait Plain: bytemuck::Pod + Send + Sync {}

impl Plain for f32 {}
impl Plain for f16 {}
impl Plain for u32 {}
impl Plain for i8 {}

/// Elements by their type, for code that knows it and not the storage type.
#[derive(Debug)]
pub enum ElementsMut<'a> {
    /// IEEE binary32.
    F32(&'a mut [f32]),
    /// IEEE binary16.
    F16(&'a mut [f16]),
}

/// A floating-point storage type. Arithmetic is always done in f32.
pub trait Element: Plain {
    /// The name of the type, as in `precision = "f16"`.
    const NAME: &'static str;
    /// Bytes of one element.
    const SIZE: usize = std::mem::size_of::<Self>();

    /// Widens exactly.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// The slice itself where the storage type is f32.
    fn as_f32(values: &[Self]) -> Option<&[f32]>;
    /// The slice itself where the storage type is f32.
    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]>;
    /// The slice by what it is.
    fn by_type(values: &mut [Self]) -> ElementsMut<'_>;
    /// Widens a slice into another of the same length.
    fn widen(out: &mut [f32], values: &[Self]);
}

impl Element for f32 {
    const NAME: &'static str = "f32";

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }

    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]> {
        Some(values)
    }

    fn by_type(values: &mut [Self]) -> ElementsMut<'_> {
        ElementsMut::F32(values)
    }

    fn widen(out: &mut [f32], values: &[Self]) {
        out.copy_from_slice(values);
    }
}

impl Element for f16 {
    const NAME: &'static str = "f16";

    // Not `half`'s conversions, which ask for the processor's abilities at every value: these have
    // neither branches nor calls, so that loops over them become vector code. The bits are the same.
    #[inline(always)]
    fn to_f32(self) -> f32 {
        const REBIAS: u32 = (127 - 15) << 23;
        const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
        let bits = u32::from(self.to_bits());
        let magnitude = (bits & 0x7fff) << 13;
        let normal = magnitude + REBIAS;
        // A subnormal number is a normal one of the lowest exponent, less the leading bit it lacks.
        let subnormal =
            f32::from_bits(magnitude + SMALLEST_NORMAL) - f32::from_bits(SMALLEST_NORMAL);
        let special = normal + REBIAS;
        let quiet = if magnitude > 0x1f << 23 { 1 << 22 } else { 0 };
        let value = if magnitude < 1 << 23 {
            subnormal.to_bits()
        } else if magnitude >= 0x1f << 23 {
            special | quiet
        } else {
            normal
        };
        f32::from_bits(value | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        const REBIAS: u32 = (127 - 15) << 23;
        const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
        const INFINITY: u32 = 0xff << 23;
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        // Adding just under half of what is cut off, and the last bit kept, rounds ties to even.
        let normal = magnitude
            .wrapping_sub(REBIAS)
            .wrapping_add(0xfff + ((magnitude >> 13) & 1))
            >> 13;
        // Beside 0.5 the last bit of an f32 is worth as much as that of a subnormal f16.
        let subnormal = (f32::from_bits(magnitude) + 0.5)
            .to_bits()
            .wrapping_sub(0.5f32.to_bits());
        let finite = if magnitude < SMALLEST_NORMAL {
            subnormal
        } else {
            normal
        };
        let special = if magnitude > INFINITY {
            0x7e00 | (magnitude >> 13) & 0x3ff
        } else {
            0x7c00
        };
        // 65,520 and above are nearer to what would be 65,536 than to 65,504.
        let rounded = if magnitude >= 0x477f_f000 {
            special
        } else {
            finite
        };
        f16::from_bits((rounded | (bits >> 16) & 0x8000) as u16)
    }

    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    fn as_f32_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }

    fn by_type(values: &mut [Self]) -> ElementsMut<'_> {
        ElementsMut::F16(values)
    }

    fn widen(out: &mut [f32], values: &[Self]) {
        use half::slice::HalfFloatSliceExt;
        values.convert_to_f32_slice(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_are_those_of_half() {
        for bits in 0..=u16::MAX {
            let value = f16::from_bits(bits);
            let (ours, theirs) = (Element::to_f32(value), value.to_f32());
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{bits:#06x}");
        }
        // Each f16 as f32, and its neighbours up to the next f16; every 251st of all others.
        let near = (0..=u16::MAX).flat_map(|bits| {
            let bits = f16::from_bits(bits).to_f32().to_bits();
            [0, 1, 0xfff, 0x1000, 0x1001, 0x1fff].map(|step| bits.wrapping_add(step))
        });
        for bits in near.chain((0..=u32::MAX).step_by(251)) {
            let value = f32::from_bits(bits);
            let (ours, theirs) = (<f16 as Element>::from_f32(value), f16::from_f32(value));
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{bits:#010x}");
        }
    }
}
