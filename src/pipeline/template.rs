//! From the `[data]` section to what text rows become.

use crate::config::run::{DataSection, TemplateKind, TrainedTurns};
use crate::data::template::{
    Alpaca, Messages, PlainText, PromptResponse, ShareGpt, Template, TemplateSettings, TrainOnTurns,
};

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
                max_length: data.max_length,
                ..usual
            })
        }
        TemplateKind::Messages => {
            let usual = Messages::default();
            Template::Messages(Messages {
                messages: or(&data.messages_column, usual.messages),
                role: or(&data.role_key, usual.role),
                content: or(&data.content_key, usual.content),
                max_length: data.max_length,
            })
        }
        TemplateKind::ShareGpt => {
            let usual = ShareGpt::default();
            Template::ShareGpt(ShareGpt {
                conversations: or(&data.messages_column, usual.conversations),
                from: or(&data.role_key, usual.from),
                value: or(&data.content_key, usual.value),
                system: or(&data.system_column, usual.system),
                max_length: data.max_length,
            })
        }
    };
    TemplateSettings {
        template,
        source_prefix: data.source_prefix.clone(),
        max_source_length: data.max_source_length,
        max_target_length: data.max_target_length,
        train_on_turns: match data.train_on_turns {
            TrainedTurns::Last => TrainOnTurns::Last,
            TrainedTurns::All => TrainOnTurns::All,
        },
        parse_special: data.parse_special,
    }
}
