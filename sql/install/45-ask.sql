/*
 * Questions to central: asked over HTTP by the caller's own backend, within the
 * caller's transaction, with the URL, the token and the TLS settings of the branch.
 * For the functions of the parts that follow; nobody else may call these.
 */

CREATE FUNCTION softmobile.ask(url text, method text, body text, max_bytes bigint,
	OUT outcome text, OUT status integer, OUT answer text, OUT content_type text, OUT server_time timestamptz, OUT milliseconds bigint,
	OUT certificate_until text, OUT error text)
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'softmobile_ask_central';
COMMENT ON FUNCTION softmobile.ask(text, text, text, bigint) IS
'Internal: one HTTP request with the token of softmobile.auth_token_file. outcome: answered (status and answer are set), offline, tls, protocol or configuration (error says why).';

CREATE FUNCTION softmobile.database_setting(name text) RETURNS text
LANGUAGE c STABLE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'softmobile_database_setting';
COMMENT ON FUNCTION softmobile.database_setting(text) IS
'Internal: softmobile.central_url or softmobile.branch_id as a session that begins now would have it, also when ALTER DATABASE has changed it since this one began.';

CREATE FUNCTION softmobile.ask_central(branch text, method text, path text, body text DEFAULT NULL, max_bytes bigint DEFAULT 16777216,
	OUT outcome text, OUT status integer, OUT answer text, OUT content_type text, OUT server_time timestamptz, OUT round_trip interval,
	OUT certificate_until timestamptz, OUT error text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	base text := rtrim(coalesce((SELECT b.central_url FROM softmobile.branch b WHERE b.branch_id = softmobile.known_branch(branch)),
		softmobile.database_setting('softmobile.central_url')), '/');
	r record;
BEGIN
	IF base = '' THEN
		outcome := 'configuration';
		error := 'softmobile.central_url is not set';
		RETURN;
	END IF;
	SELECT * INTO r FROM softmobile.ask(base || path, method, body, max_bytes);
	outcome := r.outcome;
	status := r.status;
	answer := r.answer;
	content_type := r.content_type;
	server_time := r.server_time;
	round_trip := r.milliseconds * interval '1 ms';
	error := r.error;
	BEGIN
		certificate_until := r.certificate_until::timestamptz;
	EXCEPTION WHEN data_exception THEN
		-- Another TLS library than those we know writes dates in another way.
		certificate_until := NULL;
	END;
END
$$;
COMMENT ON FUNCTION softmobile.ask_central(text, text, text, text, bigint) IS
'Internal: asks the central server of a branch. method GET or POST; path: with its slash, below central_url, percent-encoded; max_bytes: of the answer. round_trip includes connecting; server_time: the answer''s Date; certificate_until: end of the server certificate''s validity. Nothing that central or the link does is an error. Errors: 42704 unknown branch.';

CREATE FUNCTION softmobile.answer_of(branch text, method text, path text, body text, max_bytes bigint) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	r record;
	problem text;
BEGIN
	SELECT * INTO r FROM softmobile.ask_central(branch, method, path, body, max_bytes);
	IF r.outcome = 'offline' THEN
		RAISE EXCEPTION 'central cannot be reached: %', r.error
			USING ERRCODE = 'connection_failure', DETAIL = format('%s %s for branch "%s".', method, path, branch),
				HINT = 'Nothing was changed. Try again when the link is back; softmobile.sync_overview shows its state.';
	ELSIF r.outcome = 'tls' THEN
		RAISE EXCEPTION 'central cannot be trusted: %', r.error
			USING ERRCODE = 'connection_failure', HINT = 'Check softmobile.ca_file, and the certificate of the central server.';
	ELSIF r.outcome = 'configuration' THEN
		RAISE EXCEPTION 'central cannot be asked: %', r.error
			USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'Correct the settings softmobile.central_url and softmobile.auth_token_file.';
	ELSIF r.outcome = 'protocol' THEN
		RAISE EXCEPTION 'central''s answer cannot be used: %', r.error
			USING ERRCODE = 'protocol_violation', HINT = 'Check that softmobile.central_url is the central server, and not a portal or proxy in between.';
	END IF;
	BEGIN
		IF r.status = 200 THEN
			RETURN r.answer::jsonb;
		END IF;
		problem := coalesce(r.answer::jsonb ->> 'detail', r.answer::jsonb ->> 'title');
	EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
		IF r.status = 200 THEN
			RAISE EXCEPTION 'central''s answer is not JSON'
				USING ERRCODE = 'protocol_violation', HINT = 'Check that softmobile.central_url is the central server, and not a portal or proxy in between.';
		END IF;
	END;
	RAISE EXCEPTION 'central answered %', concat_ws(': ', r.status, problem)
		USING ERRCODE = CASE WHEN r.status IN (401, 403) THEN '28000' WHEN r.status IN (404, 405) THEN '0A000' ELSE '08004' END,
			DETAIL = format('%s %s for branch "%s".', method, path, branch),
			HINT = CASE WHEN r.status IN (401, 403) THEN 'Ask headquarters for a token of this branch, and put it into the file of softmobile.auth_token_file.'
				WHEN r.status IN (404, 405) THEN 'This central server does not offer it, or softmobile.central_url is not its base URL.'
				WHEN r.status < 400 THEN 'Check that softmobile.central_url is the central server, and not a portal or proxy in between.'
				ELSE 'Nothing was changed. Try again later; headquarters'' log says more.' END;
END
$$;
COMMENT ON FUNCTION softmobile.answer_of(text, text, text, text, bigint) IS
'Internal: the JSON of central''s 200. Errors: 08006 offline or not to be trusted, 08P01 no answer of ours, 28000 token refused (401, 403), 0A000 not offered (404, 405), 08004 any other status, 55000 configuration, 42704 unknown branch.';

CREATE FUNCTION softmobile.ask_json(branch text, path text, question json) RETURNS jsonb
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
RETURN softmobile.answer_of(branch, 'POST', path, question::text, 67108864);
COMMENT ON FUNCTION softmobile.ask_json(text, text, json) IS 'Internal: POST; errors as answer_of().';

CREATE FUNCTION softmobile.ask_json_get(branch text, path text, max_bytes bigint) RETURNS jsonb
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
RETURN softmobile.answer_of(branch, 'GET', path, NULL, max_bytes);
COMMENT ON FUNCTION softmobile.ask_json_get(text, text, bigint) IS 'Internal: GET; errors as answer_of().';

CREATE FUNCTION softmobile.event_digest(id uuid, entity_type text, entity_id text, operation text, actor text, reason text, data json) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN pg_catalog.left(pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(
	id::text || E'\n' || entity_type || E'\n' || entity_id || E'\n' || operation || E'\n' || coalesce(actor, '') || E'\n' || coalesce(reason, '')
	|| E'\n' || data::text, 'UTF8')), 'hex'), 32);
COMMENT ON FUNCTION softmobile.event_digest(uuid, text, text, text, text, text, json) IS
'Internal: what branch and central compare of an event: the first 16 bytes of a SHA-256 over all that it says, in hexadecimal. No search_path, so that it is inlined; its operators were bound when it was created.';
