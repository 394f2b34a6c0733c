//! From the `[data]` section to what text rows become.

use crate::config::run::{DataSection, TemplateKind};
use crate::data::template::{Alpaca, PlainText, PromptResponse, Template, TemplateSettings};

/// The template that a `[data]` section describes.
pub fn template_settings(data: &DataSection) -> TemplateSettings {
    let or = |given: &Option<String>, usual: String| given.clone().unwrap_or(usual);
    let template = match data.template {
        TemplateKind::Alpaca => {
            let usual = Alpaca::default();
            Template::Alpaca(Alpaca {
                instruction: or(&data.prompt_column, usual.instruction),
                input: or(&data.input_column, usual.input),
                output: or(&data.response_column, usual.output),
            })
        }
        TemplateKind::PromptResponse => {
            let usual = PromptResponse::default();
            Template::PromptResponse(PromptResponse {
                prompt: or(&data.prompt_column, usual.prompt),
                response: or(&data.response_column, usual.response),
                history: or(&data.history_column, usual.history),
                round_for_empty_history: data.round_for_empty_history,
            })
        }
        TemplateKind::PlainText => {
            let usual = PlainText::default();
            Template::PlainText(PlainText {
                columns: match &data.prompt_column {
                    Some(column) => vec![column.clone()],
                    None => usual.columns,
                },
                max_length: data.max_source_length + data.max_target_length,
                ..usual
            })
        }
    };
    TemplateSettings {
        template,
        source_prefix: data.source_prefix.clone(),
        max_source_length: data.max_source_length,
        max_target_length: data.max_target_length,
        parse_special: data.parse_special,
    }
}
