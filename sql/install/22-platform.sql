/*
 * The original platform's tables, attached in one call.
 *
 * Column names differ between versions of the platform and translations of its
 * schema, so each purpose has a list of names, best first.
 */

CREATE FUNCTION softmobile.platform_tables() RETURNS TABLE (place integer, table_name name, entity_type text, purposes text[])
LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	-- Lines have no amount: their money is in the sale.
	VALUES (1, 'ventas', 'sale', '{folio, amount, date}'::text[]),
		(2, 'detalle_ventas', 'sale_line', '{sku, quantity}'),
		(3, 'sale_returns', 'sale_return', '{folio, amount, date, sku, quantity}'),
		(4, 'inventory_movements', 'inventory_movement', '{date, sku, quantity}'),
		(5, 'stock_moves', 'stock_move', '{date, sku, quantity}'),
		(6, 'devices', 'device', '{sku, quantity}'),
		(7, 'repair_orders', 'repair_order', '{folio, amount, date}'),
		(8, 'repair_order_parts', 'repair_order_part', '{sku, quantity}'),
		(9, 'purchase_orders', 'purchase_order', '{folio, amount, date}'),
		(10, 'transfer_orders', 'transfer_order', '{folio, date}'),
		(11, 'clientes', 'customer', '{}'),
		(12, 'suppliers', 'supplier', '{}'),
		(13, 'pos_configs', 'pos_config', '{}'),
		(14, 'sucursales', 'store', '{}'),
		(15, 'cash_register_sessions', 'cash_register_session', '{date}');
END;
COMMENT ON FUNCTION softmobile.platform_tables() IS 'Internal: the original platform''s tables, what their rows are called, and which columns are looked for. Sales before their lines, as the platform locks them.';

CREATE FUNCTION softmobile.platform_column(relation regclass, purpose text) RETURNS name
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT w.name::name
	FROM unnest(CASE purpose
			WHEN 'branch' THEN '{store_id, sucursal_id, branch_id, tienda_id, id_sucursal, id_tienda, sucursal, tienda}'
			WHEN 'store' THEN '{id_sucursal, sucursal_id, store_id, branch_id, id}'
			WHEN 'origin' THEN '{origin_store_id, source_store_id, from_store_id, sucursal_origen_id, origin_branch_id, source_branch_id, from_branch_id, tienda_origen_id, origen_id, origin_id, sucursal_origen, origen}'
			WHEN 'destination' THEN '{destination_store_id, target_store_id, to_store_id, sucursal_destino_id, destination_branch_id, target_branch_id, to_branch_id, tienda_destino_id, destino_id, destination_id, sucursal_destino, destino}'
			WHEN 'reason' THEN '{reason, motivo, razon}'
			WHEN 'folio' THEN '{folio, numero_folio, folio_venta, folio_fiscal, receipt_number, ticket_number, document_number, invoice_number, order_number, numero_recibo, numero_ticket, numero_documento, numero_factura, numero_boleta, numero_orden, ticket, factura}'
			WHEN 'amount' THEN '{total, total_amount, importe_total, monto_total, grand_total, total_final, total_cost, refund_amount, importe, monto, amount}'
			WHEN 'date' THEN '{sold_at, fecha_venta, sale_date, returned_at, moved_at, ordered_at, fecha, fecha_hora, date, timestamp, occurred_at, performed_at, opened_at, fecha_apertura, fecha_creacion, creado_en, created_at}'
			WHEN 'sku' THEN '{sku, product_sku, producto_sku, device_sku, codigo_producto, product_code, producto_id, product_id, device_id}'
			WHEN 'quantity' THEN '{quantity, cantidad, qty, quantity_delta, qty_delta, stock, existencias}'
			END::text[]) WITH ORDINALITY AS w (name, n)
	WHERE CASE WHEN purpose IN ('amount', 'quantity') THEN softmobile.column_kind(relation, w.name::name) = 'number'
		WHEN purpose = 'date' THEN softmobile.column_kind(relation, w.name::name) = 'date'
		ELSE softmobile.column_kind(relation, w.name::name) IS NOT NULL END
	ORDER BY w.n LIMIT 1;
END;
COMMENT ON FUNCTION softmobile.platform_column(regclass, text) IS 'Internal: the column of a platform table that serves a purpose; NULL: none has a known name and a fitting type.';

-- The lock timeout is below the usual deadlock_timeout: where this call and a sale wait for each other, this call gives up.
CREATE FUNCTION softmobile.attach_softmobile(schema name DEFAULT 'public', initial text DEFAULT 'none') RETURNS TABLE (table_name text, entity_type text, priority text, attached boolean, detail text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '500ms'
AS $$
#variable_conflict use_column
DECLARE
	t record;
	target regclass;
	via regclass;
	branch name;
	fallback name;
	found jsonb;
	message text;
	hint text;
BEGIN
	IF NOT EXISTS (SELECT FROM pg_namespace n WHERE n.nspname = schema) THEN
		RAISE EXCEPTION 'schema "%" does not exist', schema
			USING ERRCODE = 'invalid_schema_name', HINT = 'Name the schema of the platform''s tables: softmobile.attach_softmobile(schema => ''...'').';
	END IF;
	IF initial IS NULL OR initial NOT IN ('none', 'snapshot') THEN
		RAISE EXCEPTION 'unknown value "%" for initial', initial
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Use ''none'', or ''snapshot'' to queue the rows that are there.';
	END IF;
	FOR t IN SELECT * FROM softmobile.platform_tables() ORDER BY place LOOP
		table_name := format('%I.%I', schema, t.table_name);
		entity_type := t.entity_type;
		target := (SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
					 WHERE n.nspname = schema AND c.relname = t.table_name);
		via := (SELECT r FROM softmobile.roots_of(ARRAY[target::oid]) AS r LIMIT 1);
		attached := via IS NOT NULL;
		IF attached THEN
			SELECT e.entity_type, format('already attached%s', CASE WHEN via <> target THEN ' through ' || via::text END)
			INTO entity_type, detail
			FROM softmobile.captured_table c JOIN softmobile.outbox_entity e USING (entity_no) WHERE c.relation = via;
		ELSIF target IS NULL THEN
			detail := 'skipped: there is no such table';
		ELSE
			branch := CASE WHEN t.entity_type = 'transfer_order' THEN softmobile.platform_column(target, 'origin')
				WHEN t.entity_type = 'store' THEN softmobile.platform_column(target, 'store') END;
			fallback := CASE WHEN t.entity_type = 'transfer_order' THEN softmobile.platform_column(target, 'destination') END;
			IF coalesce(branch, fallback) IS NULL THEN
				branch := softmobile.platform_column(target, 'branch');
			END IF;
			-- A movement is the stock's of the branch that it ends in; there is none only where goods leave.
			IF coalesce(branch, fallback) IS NULL THEN
				branch := softmobile.platform_column(target, 'destination');
				fallback := softmobile.platform_column(target, 'origin');
			END IF;
			found := jsonb_strip_nulls(jsonb_build_object('reason', softmobile.platform_column(target, 'reason')))
				|| (SELECT coalesce(jsonb_object_agg(p, softmobile.platform_column(target, p)), '{}') FROM unnest(t.purposes) AS p);
			BEGIN
				PERFORM softmobile.attach(target, t.entity_type, branch_column => coalesce(branch, fallback),
					branch_fallback_column => CASE WHEN branch IS NOT NULL THEN fallback END,
					reason_column => (found ->> 'reason')::name, folio_column => (found ->> 'folio')::name,
					amount_column => (found ->> 'amount')::name, date_column => (found ->> 'date')::name,
					sku_column => (found ->> 'sku')::name, quantity_column => (found ->> 'quantity')::name, initial => initial);
				attached := true;
				detail := 'attached: branch = ' || coalesce(nullif(concat_ws(' or ', branch, fallback), ''),
						format('softmobile.branch_id (%s)', coalesce(nullif(current_setting('softmobile.branch_id'), ''), 'not set: the name of the database')))
					|| coalesce((SELECT ', ' || string_agg(format('%s = %s', f.key, f.value), ', ' ORDER BY f.key) FROM jsonb_each_text(found) AS f WHERE f.value IS NOT NULL), '')
					|| coalesce((SELECT '; no column known for ' || string_agg(f.key, ', ' ORDER BY f.key) FROM jsonb_each_text(found) AS f WHERE f.value IS NULL), '');
			EXCEPTION
				WHEN lock_not_available OR deadlock_detected THEN
					detail := 'failed: an open transaction is using the table; call attach_softmobile() again when it has ended';
				WHEN OTHERS THEN
					GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
					detail := concat_ws('. ', 'failed: ' || message, nullif(hint, ''));
			END;
		END IF;
		priority := coalesce((SELECT e.priority FROM softmobile.outbox_entity e WHERE e.entity_type = attach_softmobile.entity_type),
			softmobile.default_priority(entity_type));
		RETURN NEXT;
	END LOOP;
END
$$;
COMMENT ON FUNCTION softmobile.attach_softmobile(name, text) IS
'Attaches every table of the original platform that is in the schema, with its entity type, priority and the columns that have a known name: one row for each table, saying what was done, or skipped and why. A table that cannot be attached is left as it was, and the others go on; a second call attaches the rest. initial ''snapshot'' also queues the rows that are there, LOW; else headquarters learns of them when they change. Waits half a second at most for a table that is being written. Errors: 3F000 no such schema, 22023 value.';
