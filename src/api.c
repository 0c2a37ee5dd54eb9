/*
 * api.c
 *		Small C functions behind the SQL interface.
 *
 * Called in the user's transaction; none takes a lock.
 */
#include "postgres.h"

#include "eventlog.h"
#include "fmgr.h"
#include "guc.h"
#include "miscadmin.h"
#include "utils/builtins.h"

PG_FUNCTION_INFO_V1(softmobile_poke);
PG_FUNCTION_INFO_V1(softmobile_url_problem);
PG_FUNCTION_INFO_V1(softmobile_calling_role);

/* softmobile.poke() -> void: wakes the worker when this transaction commits. */
Datum
softmobile_poke(PG_FUNCTION_ARGS)
{
	sm_eventlog_poke_at_commit();
	PG_RETURN_VOID();
}

/* softmobile.url_problem(text) -> text: what keeps it from being a central_url. */
Datum
softmobile_url_problem(PG_FUNCTION_ARGS)
{
	const char *problem = sm_guc_url_problem(text_to_cstring(PG_GETARG_TEXT_PP(0)));

	if (problem == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(problem));
}

/*
 * softmobile.calling_role() -> text: the role that the session acts as (SET ROLE
 * counts), whatever SECURITY DEFINER functions are on the way.
 */
Datum
softmobile_calling_role(PG_FUNCTION_ARGS)
{
	PG_RETURN_TEXT_P(cstring_to_text(GetUserNameFromId(GetOuterUserId(), false)));
}
