-- Rows of the branch (through the foreign data wrapper) beside central's, table by table. Run at the central server.
-- Every row is compared whole; differing rows are counted.
WITH branch_rows (tabla, entity_type, entity_id, row) AS (
	SELECT 'ventas', 'sale', id::text, to_jsonb(t) FROM shop.ventas t
	UNION ALL SELECT 'detalle_ventas', 'sale_line', id::text, to_jsonb(t) FROM shop.detalle_ventas t
	UNION ALL SELECT 'inventory_movements', 'inventory_movement', id::text, to_jsonb(t) FROM shop.inventory_movements t
	UNION ALL SELECT 'devices', 'device', id::text, to_jsonb(t) FROM shop.devices t
	UNION ALL SELECT 'clientes', 'customer', id::text, to_jsonb(t) FROM shop.clientes t
	UNION ALL SELECT 'sale_returns', 'sale_return', id::text, to_jsonb(t) FROM shop.sale_returns t
	UNION ALL SELECT 'repair_orders', 'repair_order', id::text, to_jsonb(t) FROM shop.repair_orders t
), central_rows AS (
	SELECT entity_type, entity_id, row::jsonb AS row FROM softmobile.central_projection WHERE branch_id = 'norte' AND NOT deleted
)
SELECT coalesce(b.tabla, c.entity_type) AS "table", count(b.row) AS branch, count(c.row) AS central,
	count(*) FILTER (WHERE b.row IS DISTINCT FROM c.row) AS different,
	to_char(sum((b.row ->> 'total')::numeric), 'FM999,999,999,990.00') AS "branch total",
	to_char(sum((c.row ->> 'total')::numeric), 'FM999,999,999,990.00') AS "central total"
FROM branch_rows b FULL JOIN central_rows c USING (entity_type, entity_id)
GROUP BY 1 ORDER BY 1;
